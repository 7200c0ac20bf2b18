-- Deletes jobs that wait and answers each; a job that a worker holds is not changed.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] HASH trail
-- KEYS[5] HASH metrics: 'settled' (jobs), 'failed:cancelled' (rows)
-- KEYS[6] STREAM webhooks
-- KEYS[7..] per job: STREAM, HASH or STRING of its reply, STRING seen, STRING partial
-- ARGV[1] group  ARGV[2] consumer of returned jobs  ARGV[3] unread bytes a reply stream may hold; then per job:
--   stream 1..3, entry id, job id, 'stream' | 'hash' | 'string' | 'none', reply ttl ms, deadline in server ms or 0,
--   reply, rows
-- A client gets no reply if the job's deadline has passed, since it waits no longer, or if its stream is full of unread
--   replies
-- Returns per job: 1 deleted and answered; 0 a worker holds it, or it is settled

local GROUP, RETURNED, UNREAD_BYTES = ARGV[1], ARGV[2], tonumber(ARGV[3])
local SEEN_AFTER_SETTLE_MS = 20000
-- Number of fields of a detached call's hash that are not jobs, without `failed`; time for its caller to submit the
-- rest of the call.
local CALL_FIELDS, SUBMITTING_MS = 4, 3600000
local MAX_PAYLOAD, MOST_WEBHOOKS, WEBHOOKS_KEPT_MS = 4096, 10000, 2 * 86400000
local METRICS_KEPT_MS = 30 * 86400000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function holder(stream, entry)
  local pending = redis.call('XPENDING', stream, GROUP, entry, entry, 1)[1]
  return pending and pending[2]
end

local full = {}

local function is_full(key)
  if full[key] == nil then
    local size = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', '16')
    full[key] = type(size) == 'number' and size >= UNREAD_BYTES
  end
  return full[key]
end

-- As in settle: announces a call whose jobs are all answered, if its payload has a webhook.
local function announce(key, payload, failures)
  if #payload > MAX_PAYLOAD or not string.match(payload, '^%d+x%d+ %x* %S+$') then return end
  redis.pcall('XADD', KEYS[6], 'MAXLEN', '~', MOST_WEBHOOKS, '*',
    'call', string.match(key, '[^:]*$'), 'payload', payload, 'failed', failures)
  redis.pcall('PEXPIRE', KEYS[6], WEBHOOKS_KEPT_MS)
end

-- As in settle: writes a result of a detached call to its hash, see enqueue. All results of a call expire together, a
-- ttl after the last one. A result that exists is not replaced.
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

local function answer(kind, key, job, ttl, deadline, reply, rows)
  if kind == 'hash' then
    keep(key, job, ttl, reply, rows)
  elseif kind == 'string' then
    redis.pcall('SET', key, reply, 'PX', ttl)
  elseif kind == 'stream' and (deadline == 0 or now < deadline) and not is_full(key) then
    redis.pcall('XADD', key, '*', 'id', job, 'reply', reply)
    redis.call('PEXPIRE', key, ttl)
  end
end

-- Adds to a counter. pcall: counting must not fail a job. A result of `n` says that the field is new, perhaps with its
-- key, which heartbeats then renew.
local function count(field, n)
  if n > 0 and redis.pcall('HINCRBY', KEYS[5], field, n) == n then redis.pcall('PEXPIRE', KEYS[5], METRICS_KEPT_MS) end
end

-- Set by fair_delete.lua: unindex(stream, entry id), before the entry is deleted.
local unindex -- luacheck: ignore 221

-- fair parts

local outcomes, jobs_deleted, rows_deleted = {}, 0, 0
local arg, key = 4, 7
while arg <= #ARGV do
  local stream, entry, job = KEYS[tonumber(ARGV[arg])], ARGV[arg + 1], ARGV[arg + 2]
  local kind, ttl, deadline, reply = ARGV[arg + 3], ARGV[arg + 4], tonumber(ARGV[arg + 5]), ARGV[arg + 6]
  local owner = holder(stream, entry)
  local gone = 0
  if not owner or owner == RETURNED then
    -- Both are allowed at maxmemory, and then so are the writes after them.
    redis.call('XACK', stream, GROUP, entry)
    if unindex then unindex(tonumber(ARGV[arg]), entry) end
    gone = redis.call('XDEL', stream, entry)
    local name = ARGV[arg] .. ':' .. entry
    if owner then redis.call('HDEL', KEYS[4], name, name .. ':batch') end
  end
  if gone == 1 then
    jobs_deleted, rows_deleted = jobs_deleted + 1, rows_deleted + ARGV[arg + 7]
    redis.call('DEL', KEYS[key + 2])
    answer(kind, KEYS[key], job, ttl, deadline, reply, tonumber(ARGV[arg + 7]))
    -- As in settle: a detached job stays known as long as its result.
    redis.call('PEXPIRE', KEYS[key + 1], kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
  end
  outcomes[#outcomes + 1] = gone
  arg, key = arg + 8, key + 3
end
count('settled', jobs_deleted)
count('failed:cancelled', rows_deleted)
return outcomes
