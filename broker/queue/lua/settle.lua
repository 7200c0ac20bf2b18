-- Answer jobs and retire their entries, each once: the first caller wins, a late twin changes nothing.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STREAM dead letters   KEYS[5] HASH trail
-- KEYS[6] ZSET cancelled
-- KEYS[7..] per way that replies go: STREAM, HASH of a detached call or STRING; then per job: STRING seen, and STRING
--   partial if its way says that it streams
-- ARGV[1] group  ARGV[2] dead letters kept  ARGV[3] unread bytes a reply stream may hold
-- ARGV[4] the small error reply that stands in for replies beyond that  ARGV[5] ways
-- then per way: 'stream' | 'hash' | 'string' (detached jobs of older clients) | 'none', reply ttl ms, 1 if its jobs
--   stream: what they emitted goes with the entry
-- then per job: stream 1..3 ':' entry id, way 1.., job id, reply, reason to bury it ('' for none)
-- A dead letter is the entry's fields after: reason, entry, buried (ms), priority, attempts and consumer where known,
--   history where a run did not end: a line each, as release and reclaim wrote it
--   cut where fields were too long: how many bytes are missing at its end
-- Returns per job: 1 answered; 2 its client reads too slowly and got the error in place of the reply; 0 settled before;
--   -1 nothing could be written, or it calls itself by another job's id: a dead letter holds it
-- A reply stream that is full of unread replies takes errors only, and a bounded number of them: whoever should read it
-- is slow, and must hear of it, or dead

local GROUP, DEAD_KEPT, UNREAD_BYTES, UNREAD, WAYS =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local SEEN_AFTER_SETTLE_MS = '20000'
-- The fields of a detached call's hash that are no job's; how long its caller may take to submit the rest of it.
local CALL_FIELDS, SUBMITTING_MS = 4, 3600000
local MAX_FIELDS = 64
local MAX_BYTES = 1048576
local FEW_UNREAD = 16
-- A full stream takes errors while it has fewer entries than this, or until it is an eighth above its limit.
local MOST_ERRORS = 4096
local PRIORITIES = {'realtime', 'normal', 'batch'}
local OURS = {reason = true, entry = true, buried = true, priority = true, attempts = true, consumer = true,
  history = true, cut = true}

-- Who holds the entry, and what it has been through; gone with XACK. Deliveries count as lease.py says.
local function history(stream, id)
  local pending = redis.pcall('XPENDING', stream, GROUP, id, id, 1)[1]
  if not pending then return {} end
  return {'attempts', string.format('%g', (pending[4] - 1) / 2), 'consumer', pending[2]}
end

-- Both are rare: asked for together.
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
  local kept, over = {}, 0
  local left = MAX_BYTES
  for i = 1, math.min(#fields, MAX_FIELDS) do
    local part = string.sub(fields[i], 1, left)
    left, over = left - #part, over + #fields[i] - #part
    -- What an entry calls itself must not pass for what we say of it.
    kept[i] = i % 2 == 1 and OURS[part] and 'entry.' .. part or part
  end
  if over > 0 then copy[#copy + 1], copy[#copy + 2] = 'cut', string.format('%d', over) end
  for _, part in ipairs(kept) do copy[#copy + 1] = part end
  -- pcall: whatever became of the dead letters, the jobs after this one are to be settled.
  redis.pcall('XADD', KEYS[4], 'MAXLEN', '~', DEAD_KEPT, '*', unpack(copy))
end

local expiring, sizes, lengths = {}, {}, {}

-- Asked once a call, and only where much is unread: the streams of clients that read are short.
local function size_of(key)
  if sizes[key] == nil then
    local size = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', '16')
    sizes[key] = type(size) == 'number' and size or 0
  end
  return sizes[key]
end

-- A result of a detached call, whose hash enqueue describes. All its results expire together, a ttl after the last one;
-- an answer that is there is not replaced.
local function keep(key, job, ttl, reply)
  local length = redis.pcall('HSTRLEN', key, job)
  if length ~= 0 then return false end
  local new = redis.call('HSET', key, job, reply)
  if redis.call('HINCRBY', key, 'left', new - 1) > 0 then return true end
  local jobs, own_ttl = unpack(redis.call('HMGET', key, 'jobs', 'ttl'))
  ttl = tonumber(own_ttl) or tonumber(ttl)
  if jobs and redis.call('HLEN', key) < CALL_FIELDS + jobs then ttl = math.max(ttl, SUBMITTING_MS) end
  redis.call('PEXPIRE', key, string.format('%.0f', ttl))
  return true
end

local ANSWERED, UNREAD_INSTEAD, UNWRITABLE = 1, 2, -1

local function answer(kind, key, job, ttl, reply)
  if kind == 'none' then return ANSWERED end
  if kind == 'hash' then return keep(key, job, ttl, reply) and ANSWERED or UNWRITABLE end
  if kind == 'string' then
    return redis.pcall('SET', key, reply, 'PX', ttl).err and UNWRITABLE or ANSWERED
  end
  -- pcall: whatever else may lie under its key.
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

-- Only the entry that was accepted under an id answers to it: another one's answer would reach the job's own caller.
local function is_another(seen, name, id)
  local accepted = redis.pcall('GET', seen)
  -- Without the stream it was written by a client of an older version.
  return type(accepted) == 'string' and accepted ~= name and accepted ~= id
end

local outcomes, retired = {}, {{}, {}, {}}
local arg, seen = 6 + 3 * WAYS, 7 + WAYS
while arg <= #ARGV do
  local name, way, job, reply, reason = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2], ARGV[arg + 3], ARGV[arg + 4]
  local kind, ttl, streams = ARGV[3 + 3 * way], ARGV[4 + 3 * way], ARGV[5 + 3 * way] == '1'
  local priority, id = tonumber(string.sub(name, 1, 1)), string.sub(name, 3)
  local stream = KEYS[priority]
  local past = reason ~= '' and history(stream, id) or {}
  -- XACK first: it is allowed at maxmemory, and what follows it in the script then is too.
  if redis.call('XACK', stream, GROUP, id) == 0 then
    outcomes[#outcomes + 1] = 0
  else
    local another = is_another(KEYS[seen], name, id)
    local outcome = another and UNWRITABLE or answer(kind, KEYS[6 + way], job, ttl, reply)
    if another then reason = 'malformed: its id is another job\'s'
    elseif outcome == UNWRITABLE then reason = 'reply_unwritable' end
    if marked then redis.call('ZREM', KEYS[6], name) end
    if trailed then end_trail(past, name) end
    if reason ~= '' then bury(priority, id, reason, past) end
    retired[priority][#retired[priority] + 1] = id
    -- A detached job stays known as long as its result, of newer clients by the hash of its call.
    if not another then
      redis.call('PEXPIRE', KEYS[seen], kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
      if streams then redis.call('DEL', KEYS[seen + 1]) end
    end
    outcomes[#outcomes + 1] = outcome
  end
  arg, seen = arg + 5, seen + (streams and 2 or 1)
end
for priority, ids in ipairs(retired) do
  if #ids > 0 then redis.call('XDEL', KEYS[priority], unpack(ids)) end
end
for reply_key, ttl in pairs(expiring) do redis.call('PEXPIRE', reply_key, ttl) end
return outcomes
