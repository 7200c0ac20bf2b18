-- Answers jobs and deletes their entries, each once: the first caller wins, a second one changes nothing.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STREAM dead letters   KEYS[5] HASH trail
-- KEYS[6] ZSET cancelled
-- KEYS[7] HASH metrics: 'single' (jobs of one row with a result); of the others 'settled' (jobs) and 'ok' (rows);
--   'failed:CODE' (rows), 'buried:REASON' (jobs)
-- KEYS[8] STREAM webhooks
-- KEYS[9..] per destination of replies: STREAM, HASH of a detached call or STRING; then per job: STRING seen, and
--   STRING partial if its destination is of jobs that stream
-- ARGV[1] group  ARGV[2] most dead letters  ARGV[3] unread bytes a reply stream may hold
-- ARGV[4] small error reply that replaces replies beyond that  ARGV[5] number of destinations
-- then per destination: 'stream' | 'hash' | 'string' (detached jobs of older clients) | 'none', reply ttl ms, 1 if its
--   jobs stream
-- then per job: stream 1..3 ':' entry id, destination 1.., job id, reply, reason for a dead letter ('' for none),
--   rows of the reply without an error, and if there are others, ' CODE ROWS' for each error code
-- A dead letter has these fields, then the entry's: reason, entry, buried (ms), priority;
--   attempts and consumer if known;
--   history if a run did not finish: a line for each, as release and reclaim wrote it;
--   cut if fields were too long: the number of bytes that are missing at its end
-- Returns per job: 1 answered; 2 its client has too many unread replies, and got the error instead; 0 settled before;
--   -1 the reply could not be written, or its id belongs to another job: the job is now a dead letter
-- A reply stream that is full of unread replies takes only errors, and a limited number of them: its client is dead, or
--   slow and must be told

local GROUP, MAX_DEAD, UNREAD_BYTES, UNREAD, DESTINATIONS =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local SEEN_AFTER_SETTLE_MS = '20000'
-- Number of fields of a detached call's hash that are not jobs, without `failed`; time for its caller to submit the
-- rest of the call.
local CALL_FIELDS, SUBMITTING_MS = 4, 3600000
local MAX_PAYLOAD, MOST_WEBHOOKS, WEBHOOKS_KEPT_MS = 4096, 10000, 2 * 86400000
local MAX_FIELDS = 64
local MAX_BYTES = 1048576
local FEW_UNREAD = 16
-- A full stream takes errors while it has fewer entries than this, or is at most an eighth above its limit.
local MOST_ERRORS = 4096
local METRICS_KEPT_MS = 30 * 86400000
local PRIORITIES = {'realtime', 'normal', 'batch'}
local OURS = {reason = true, entry = true, buried = true, priority = true, attempts = true, consumer = true,
  history = true, cut = true}

-- What this call adds to the counters: once for each of them in the end.
local added, single = {}, 0

local function add(field, n) added[field] = (added[field] or 0) + n end

-- Counts a settled job with its rows. `instead` is the code of the error that all of them got instead of their reply.
local function add_job(rows, instead)
  if rows == '1' and not instead then
    single = single + 1
    return
  end
  add('settled', 1)
  local good, others = string.match(rows, '^(%d+)(.*)$')
  local total = tonumber(good)
  for code, failed in string.gmatch(others, ' (%S+) (%d+)') do
    total = total + failed
    if not instead then add('failed:' .. code, tonumber(failed)) end
  end
  if instead then add('failed:' .. instead, total) else add('ok', tonumber(good)) end
end

-- Adds to a counter. pcall: counting must not fail a job. A result of `n` says that the field is new, perhaps with its
-- key, which heartbeats then renew.
local function count(field, n)
  if n > 0 and redis.pcall('HINCRBY', KEYS[7], field, n) == n then redis.pcall('PEXPIRE', KEYS[7], METRICS_KEPT_MS) end
end

-- Returns the entry's attempts and its consumer, which XACK deletes. lease.py defines the delivery count.
local function history(stream, id)
  local pending = redis.pcall('XPENDING', stream, GROUP, id, id, 1)[1]
  if not pending then return {} end
  return {'attempts', string.format('%g', (pending[4] - 1) / 2), 'consumer', pending[2]}
end

-- Both keys are rare: one command checks for both.
local some = redis.call('EXISTS', KEYS[5], KEYS[6]) > 0
local trailed = some and redis.call('EXISTS', KEYS[5]) == 1
local marked = some and redis.call('EXISTS', KEYS[6]) == 1

local function end_trail(past, name)
  local trail = redis.call('HGET', KEYS[5], name)
  if not trail then return end
  past[#past + 1], past[#past + 2] = 'history', trail
  redis.call('HDEL', KEYS[5], name, name .. ':batch')
end

local function bury(priority, id, reason, past)
  local entry = redis.call('XRANGE', KEYS[priority], id, id)[1]
  local time = redis.call('TIME')
  local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
  local copy = {'reason', reason, 'entry', id, 'buried', now, 'priority', PRIORITIES[priority]}
  for _, field in ipairs(past) do copy[#copy + 1] = field end
  local fields = entry and entry[2] or {}
  local parts, over = {}, 0
  local room = MAX_BYTES
  for i = 1, math.min(#fields, MAX_FIELDS) do
    local part = string.sub(fields[i], 1, room)
    room, over = room - #part, over + #fields[i] - #part
    -- The prefix: an entry's own fields must not be taken for those of settle.
    parts[i] = i % 2 == 1 and OURS[part] and 'entry.' .. part or part
  end
  if over > 0 then copy[#copy + 1], copy[#copy + 2] = 'cut', string.format('%d', over) end
  for _, part in ipairs(parts) do copy[#copy + 1] = part end
  -- pcall: if the dead letter cannot be written, the jobs after this one are still settled.
  local letter = redis.pcall('XADD', KEYS[4], 'MAXLEN', '~', MAX_DEAD, '*', unpack(copy))
  if type(letter) == 'string' then add('buried:' .. string.match(reason, '^[^:]*'), 1) end
end

local expiring, sizes, lengths = {}, {}, {}

-- Reads a stream's size once in each call, and only if it is long: streams of clients that read are short.
local function size_of(key)
  if sizes[key] == nil then
    local size = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', '16')
    sizes[key] = type(size) == 'number' and size or 0
  end
  return sizes[key]
end

-- Announces a call whose jobs are all answered, if its payload has a webhook. pcall: a key of another type must not
-- fail a job.
local function announce(key, payload, failures)
  if #payload > MAX_PAYLOAD or not string.match(payload, '^%d+x%d+ %x* %S+$') then return end
  redis.pcall('XADD', KEYS[8], 'MAXLEN', '~', MOST_WEBHOOKS, '*',
    'call', string.match(key, '[^:]*$'), 'payload', payload, 'failed', failures)
  redis.pcall('PEXPIRE', KEYS[8], WEBHOOKS_KEPT_MS)
end

-- Writes a result of a detached call to its hash, see enqueue. All results of a call expire together, a ttl after the
-- last one. A result that exists is not replaced.
local function keep(key, job, ttl, reply, failed)
  local length = redis.pcall('HSTRLEN', key, job)
  if length ~= 0 then return false end
  local new = redis.call('HSET', key, job, reply)
  if failed > 0 then redis.call('HINCRBY', key, 'failed', failed) end
  if redis.call('HINCRBY', key, 'left', new - 1) > 0 then return true end
  local found = redis.call('HMGET', key, 'jobs', 'ttl', 'payload', 'failed')
  local jobs, own_ttl, payload, failures = unpack(found, 1, 4)
  ttl = tonumber(own_ttl) or tonumber(ttl)
  if jobs and redis.call('HLEN', key) < CALL_FIELDS + (failures and 1 or 0) + jobs then
    ttl = math.max(ttl, SUBMITTING_MS)
  elseif payload then
    announce(key, payload, failures or '0')
  end
  redis.call('PEXPIRE', key, string.format('%.0f', ttl))
  return true
end

local ANSWERED, UNREAD_INSTEAD, UNWRITABLE = 1, 2, -1

-- Counts the rows of a reply that have an error.
local function failures_of(rows)
  local failed = 0
  for failures in string.gmatch(rows, ' %S+ (%d+)') do failed = failed + failures end
  return failed
end

local function answer(kind, key, job, ttl, reply, rows)
  if kind == 'none' then return ANSWERED end
  if kind == 'hash' then return keep(key, job, ttl, reply, failures_of(rows)) and ANSWERED or UNWRITABLE end
  if kind == 'string' then
    return redis.pcall('SET', key, reply, 'PX', ttl).err and UNWRITABLE or ANSWERED
  end
  -- pcall: the key may have another type.
  if not expiring[key] then lengths[key] = tonumber(redis.pcall('XLEN', key)) or 0 end
  local outcome = ANSWERED
  if lengths[key] > FEW_UNREAD and size_of(key) >= UNREAD_BYTES then
    if lengths[key] >= MOST_ERRORS and size_of(key) >= UNREAD_BYTES * 9 / 8 then return UNWRITABLE end
    reply, outcome = UNREAD, UNREAD_INSTEAD
  end
  local written = redis.pcall('XADD', key, '*', 'id', job, 'reply', reply)
  if type(written) == 'table' and written.err then return UNWRITABLE end
  expiring[key], lengths[key] = ttl, lengths[key] + 1
  return outcome
end

-- Tells if the job id belongs to another entry, the one that was accepted with it: its caller must not get this reply.
local function is_another(seen, name, id)
  local accepted = redis.pcall('GET', seen)
  -- Clients of older versions wrote the entry id alone, without the stream.
  return type(accepted) == 'string' and accepted ~= name and accepted ~= id
end

-- Set by fair_settle.lua: free_job(stream, entry id), for each job that ends.
local free_job -- luacheck: ignore 221

-- fair parts

local INSTEAD = {[UNREAD_INSTEAD] = 'reader_too_slow', [UNWRITABLE] = 'reply_unwritable'}
local outcomes, retired = {}, {{}, {}, {}}
local arg, seen = 6 + 3 * DESTINATIONS, 9 + DESTINATIONS
while arg <= #ARGV do
  local name, destination, job = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2]
  local reply, reason = ARGV[arg + 3], ARGV[arg + 4]
  local kind, ttl, streams = ARGV[3 + 3 * destination], ARGV[4 + 3 * destination], ARGV[5 + 3 * destination] == '1'
  local priority, id = tonumber(string.sub(name, 1, 1)), string.sub(name, 3)
  local stream = KEYS[priority]
  local past = reason ~= '' and history(stream, id) or {}
  -- XACK first: at maxmemory it is allowed, and then so are the writes after it.
  if redis.call('XACK', stream, GROUP, id) == 0 then
    outcomes[#outcomes + 1] = 0
  else
    local another = is_another(KEYS[seen], name, id)
    local outcome = another and UNWRITABLE or answer(kind, KEYS[8 + destination], job, ttl, reply, ARGV[arg + 5])
    if another then reason = 'malformed: its id is another job\'s'
    elseif outcome == UNWRITABLE then reason = 'reply_unwritable' end
    if marked then redis.call('ZREM', KEYS[6], name) end
    if trailed then end_trail(past, name) end
    if free_job then free_job(priority, id) end
    if reason ~= '' then bury(priority, id, reason, past) end
    retired[priority][#retired[priority] + 1] = id
    -- A detached job stays known as long as its result; the hash of its call does this for newer clients.
    if not another then
      redis.call('PEXPIRE', KEYS[seen], kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
      if streams then redis.call('DEL', KEYS[seen + 1]) end
    end
    add_job(ARGV[arg + 5], INSTEAD[outcome])
    outcomes[#outcomes + 1] = outcome
  end
  arg, seen = arg + 6, seen + (streams and 2 or 1)
end
for priority, ids in ipairs(retired) do
  if #ids > 0 then redis.call('XDEL', KEYS[priority], unpack(ids)) end
end
for reply_key, ttl in pairs(expiring) do redis.call('PEXPIRE', reply_key, ttl) end
count('single', single)
for field, n in pairs(added) do count(field, n) end
return outcomes
