-- Stop jobs that nobody wants any more: one that waits is gone, one that a worker holds is marked for it.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET cancelled   KEYS[5] HASH trail
-- KEYS[6..] per job: STRING seen, HASH or STRING where its result goes, STRING partial
-- ARGV[1] group  ARGV[2] consumer of returned jobs  ARGV[3] how long a mark lives, ms
-- then per job: job id, 'hash' | 'string' | 'none' (the client that cancels waits for no reply), result ttl ms, result
-- Returns per job: 2 it waited and will not run; 1 its worker is told at its next beat; 0 settled, or never was

local GROUP, RETURNED, MARKS_KEPT_MS = ARGV[1], ARGV[2], tonumber(ARGV[3])
local SEEN_AFTER_SETTLE_MS = 20000
-- The fields of a detached call's hash that are no job's; how long its caller may take to submit the rest of it.
local CALL_FIELDS, SUBMITTING_MS = 4, 3600000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Where an accepted job lies: its stream and its entry there; nothing where it is settled. Clients of an older version
-- left the stream out, and two streams may use the same entry id within one ms: the entry itself says whose job it is.
local function find(accepted, job)
  local named, entry = string.match(accepted, '^([123]):(.+)$')
  for stream = tonumber(named or 1), tonumber(named or 3) do
    local found = redis.call('XRANGE', KEYS[stream], entry or accepted, entry or accepted)[1]
    if found and found[2][3] == 'id' and found[2][4] == job then return stream, entry or accepted end
  end
end

local function holder(stream, entry)
  local pending = redis.call('XPENDING', KEYS[stream], GROUP, entry, entry, 1)[1]
  return pending and pending[2]
end

-- As in settle: a result of a detached call, whose hash enqueue describes. All its results expire together, a ttl after
-- the last one; an answer that is there is not replaced.
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

local function answer(kind, key, job, ttl, result)
  if kind == 'hash' then
    keep(key, job, ttl, result)
  elseif kind == 'string' then
    redis.pcall('SET', key, result, 'PX', ttl)
  end
end

local function cancel(seen, key, partial, job, kind, ttl, result)
  local accepted = redis.call('GET', seen)
  if not accepted then return 0 end
  local stream, entry = find(accepted, job)
  if not stream then return 0 end
  local owner = holder(stream, entry)
  if owner and owner ~= RETURNED then
    redis.call('ZADD', KEYS[4], now, stream .. ':' .. entry)
    redis.call('PEXPIRE', KEYS[4], MARKS_KEPT_MS)
    return 1
  end
  if owner then
    -- pcall: callers need no right to XACK, with which they could settle what others hold; claim does both then.
    redis.pcall('XACK', KEYS[stream], GROUP, entry)
    redis.pcall('HDEL', KEYS[5], stream .. ':' .. entry, stream .. ':' .. entry .. ':batch')
  end
  redis.call('XDEL', KEYS[stream], entry)
  redis.call('DEL', partial)
  answer(kind, key, job, ttl, result)
  -- As settle: a detached job stays known as long as its result, of newer clients by the hash of its call.
  redis.call('PEXPIRE', seen, kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
  return 2
end

-- Also what lies ahead of the clock, which stepped back since.
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - MARKS_KEPT_MS)
redis.call('ZREMRANGEBYSCORE', KEYS[4], now + MARKS_KEPT_MS, '+inf')
local outcomes, key = {}, 6
for arg = 4, #ARGV, 4 do
  outcomes[#outcomes + 1] = cancel(KEYS[key], KEYS[key + 1], KEYS[key + 2],
    ARGV[arg], ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3])
  key = key + 3
end
return outcomes
