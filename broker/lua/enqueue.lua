-- Accept jobs, in groups: a group enters whole or not at all, once, however often its caller sends it.
-- KEYS[1] HASH the service   KEYS[2..4] STREAM realtime, normal, batch   KEYS[5..] STRING seen, one a job
-- ARGV[1] groups, each as: priority 1..3, jobs, then per job
--         id op rows tokens deadline_in queue_in client tenant trace body   (times in ms from now, '' for none)
-- Returns per group {1} accepted; {2} accepted before; {0, reason, retry_after_ms} refused
-- Refusals: unknown_service, queue_full

local ACCEPTED, ACCEPTED_BEFORE, REFUSED = 1, 2, 0
local SEEN_AFTER_DEADLINE_MS = 60000
local SEEN_WITHOUT_DEADLINE_MS = 7 * 86400000
local RETRY_AFTER_MS = 100

-- The server's clock: callers' clocks differ, deadlines must not.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local spec = redis.call('HMGET', KEYS[1], 'version', 'max_queue_size')
local known, limit = spec[1], tonumber(spec[2])
local depth = redis.call('XLEN', KEYS[2]) + redis.call('XLEN', KEYS[3]) + redis.call('XLEN', KEYS[4])

local function from_now(remaining)
  return remaining == '' and '0' or string.format('%.0f', now + remaining)
end

local function accept(stream, seen, at)
  local remaining = ARGV[at + 4]
  local entry = redis.call('XADD', stream, '*',
    'v', '1', 'id', ARGV[at], 'at', string.format('%.0f', now), 'op', ARGV[at + 1],
    'rows', ARGV[at + 2], 'tokens', ARGV[at + 3],
    'deadline', from_now(remaining), 'queue_by', from_now(ARGV[at + 5]),
    'client', ARGV[at + 6], 'tenant', ARGV[at + 7], 'trace', ARGV[at + 8], 'body', ARGV[at + 9])
  local life = remaining == '' and SEEN_WITHOUT_DEADLINE_MS or remaining + SEEN_AFTER_DEADLINE_MS
  redis.call('SET', seen, entry, 'PX', string.format('%.0f', life))
end

local outcomes = {}
local arg, seen = 2, 5
for group = 1, tonumber(ARGV[1]) do
  local stream, jobs = KEYS[1 + ARGV[arg]], tonumber(ARGV[arg + 1])
  arg = arg + 2
  if not known then
    outcomes[group] = {REFUSED, 'unknown_service', 0}
  elseif redis.call('EXISTS', KEYS[seen]) == 1 then
    outcomes[group] = {ACCEPTED_BEFORE}
  elseif limit and depth + jobs > limit then
    outcomes[group] = {REFUSED, 'queue_full', RETRY_AFTER_MS}
  else
    for job = 0, jobs - 1 do accept(stream, KEYS[seen + job], arg + 10 * job) end
    depth = depth + jobs
    outcomes[group] = {ACCEPTED}
  end
  arg, seen = arg + 10 * jobs, seen + jobs
end
return outcomes
