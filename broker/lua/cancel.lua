-- Stop jobs that nobody wants any more: one that waits is gone and answered, one that a worker holds is marked for it.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET cancelled   KEYS[5] HASH trail
-- KEYS[6..] per job: STRING seen, STREAM or STRING where its reply goes
-- ARGV[1] group  ARGV[2] consumer of returned jobs; then per job: job id, 'stream' | 'string', reply ttl ms, reply
-- Returns per job: 2 it waited and will not run; 1 its worker is told at its next beat; 0 settled, or never was

local GROUP, RETURNED = ARGV[1], ARGV[2]
local MARKS_KEPT_MS = 3600000
local SEEN_AFTER_SETTLE_MS = 20000

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

local function answer(kind, key, job, ttl, reply)
  if kind == 'string' then
    redis.pcall('SET', key, reply, 'PX', ttl)
  else
    redis.pcall('XADD', key, '*', 'id', job, 'reply', reply)
    redis.call('PEXPIRE', key, ttl)
  end
end

local function cancel(seen, key, job, kind, ttl, reply)
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
  answer(kind, key, job, ttl, reply)
  -- As settle: a detached job stays known as long as its result, and no longer.
  redis.call('PEXPIRE', seen, kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
  return 2
end

redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - MARKS_KEPT_MS)
local outcomes, key = {}, 6
for arg = 3, #ARGV, 4 do
  outcomes[#outcomes + 1] = cancel(KEYS[key], KEYS[key + 1], ARGV[arg], ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3])
  key = key + 2
end
return outcomes
