-- Take jobs off the queue before anybody runs them, and answer each; what a worker holds is left alone.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] HASH trail
-- KEYS[5..] per job: STREAM or STRING where its reply goes, STRING seen
-- ARGV[1] group  ARGV[2] consumer of returned jobs; then per job:
--   stream 1..3, entry id, job id, 'stream' | 'string' | 'none', reply ttl ms, reply
-- Returns per job: 1 gone and answered; 0 a worker holds it, or it is settled

local GROUP, RETURNED = ARGV[1], ARGV[2]
local SEEN_AFTER_SETTLE_MS = 20000

local function holder(stream, entry)
  local pending = redis.call('XPENDING', stream, GROUP, entry, entry, 1)[1]
  return pending and pending[2]
end

local function answer(kind, key, job, ttl, reply)
  if kind == 'string' then
    redis.pcall('SET', key, reply, 'PX', ttl)
  elseif kind == 'stream' then
    redis.pcall('XADD', key, '*', 'id', job, 'reply', reply)
    redis.call('PEXPIRE', key, ttl)
  end
end

local outcomes = {}
local arg, key = 3, 5
while arg <= #ARGV do
  local stream, entry, job = KEYS[tonumber(ARGV[arg])], ARGV[arg + 1], ARGV[arg + 2]
  local kind, ttl, reply = ARGV[arg + 3], ARGV[arg + 4], ARGV[arg + 5]
  local owner = holder(stream, entry)
  local gone = 0
  if not owner or owner == RETURNED then
    -- Both are allowed at maxmemory, and what follows them in the script then is too.
    redis.call('XACK', stream, GROUP, entry)
    gone = redis.call('XDEL', stream, entry)
    local name = ARGV[arg] .. ':' .. entry
    if owner then redis.call('HDEL', KEYS[4], name, name .. ':batch') end
  end
  if gone == 1 then
    answer(kind, KEYS[key], job, ttl, reply)
    -- As settle: a detached job stays known as long as its result, and no longer.
    redis.call('PEXPIRE', KEYS[key + 1], kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
  end
  outcomes[#outcomes + 1] = gone
  arg, key = arg + 6, key + 2
end
return outcomes
