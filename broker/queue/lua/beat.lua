-- Records a worker's heartbeat, extends the lease on all entries that it owns, and returns changes in what it owns.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET workers   KEYS[5] HASH this worker   KEYS[6] STRING reclaim
-- KEYS[7] ZSET cancelled   KEYS[8] HASH the service   KEYS[9] HASH metrics   KEYS[10] ZSET standby
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] lease ms
-- ARGV[4] n, ARGV[5] number of the package of counters, 0 if there is none, ARGV[6] m
-- then n pairs of field and value for the worker's hash, m pairs of field and number to add to the metrics, and the
--   entries it holds, as 'stream:entry id'
-- A worker whose field `resident` is 0 lives, but has to load its model before it claims: it is not ready.
-- A package is added once: the worker's hash has the number of its last one, and numbers rise.
-- Returns {now_ms, live workers, 1 if a reclaim pass is due, revision of the service (each push raises it),
--   {lost: held, but no longer its own}, {unknown: its own, but not held}, {cancelled since the last heartbeat},
--   ready workers}

local GROUP, CONSUMER, LEASE = ARGV[1], ARGV[2], tonumber(ARGV[3])
local DAY_MS, RECLAIM_EVERY_MS, METRICS_KEPT_MS = 86400000, 1000, 30 * 86400000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- ZREM first: at maxmemory it is allowed, and then so are the writes after it. A full server must not lose its workers.
redis.call('ZREM', KEYS[4], CONSUMER)
redis.call('ZADD', KEYS[4], now, CONSUMER)
redis.call('PEXPIRE', KEYS[4], DAY_MS)
local package, metrics_at = tonumber(ARGV[5]), 7 + 2 * ARGV[4]
local held_at = metrics_at + 2 * ARGV[6]
local ready = true
for i = 7, metrics_at - 1, 2 do
  redis.call('HSET', KEYS[5], ARGV[i], ARGV[i + 1])
  if ARGV[i] == 'resident' and ARGV[i + 1] == '0' then ready = false end
end
redis.call('ZREM', KEYS[10], CONSUMER)
if not ready then
  redis.call('ZADD', KEYS[10], now, CONSUMER)
  redis.call('PEXPIRE', KEYS[10], DAY_MS)
end
redis.call('HSET', KEYS[5], 'beat', string.format('%.0f', now))
-- pcall: whatever else may lie under the key of the metrics, the worker lives.
if package > (tonumber(redis.call('HGET', KEYS[5], 'package')) or 0) then
  for i = metrics_at, held_at - 1, 2 do redis.pcall('HINCRBY', KEYS[9], ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', KEYS[5], 'package', ARGV[5])
end
redis.call('PEXPIRE', KEYS[5], LEASE * 4)
redis.pcall('PEXPIRE', KEYS[9], METRICS_KEPT_MS)

local mine = {}
for stream = 1, 3 do
  local stale = {}
  for _, pending in ipairs(redis.call('XPENDING', KEYS[stream], GROUP, '-', '+', 100000, CONSUMER)) do
    mine[stream .. ':' .. pending[1]] = true
    if pending[3] > LEASE / 3 and #stale < 1000 then stale[#stale + 1] = pending[1] end
  end
  -- JUSTID keeps the delivery count, which counts attempts.
  if #stale > 0 then
    stale[#stale + 1] = 'JUSTID'
    redis.call('XCLAIM', KEYS[stream], GROUP, CONSUMER, 0, unpack(stale))
  end
end

local last = string.match(redis.call('GET', KEYS[6]) or '', '^%d+')
local due = (not last or now - last >= RECLAIM_EVERY_MS or tonumber(last) > now) and 1 or 0

local lost, unknown, cancelled = {}, {}, {}
local held = {}
for i = held_at, #ARGV do
  held[ARGV[i]] = true
  if not mine[ARGV[i]] then lost[#lost + 1] = ARGV[i] end
end
for entry in pairs(mine) do
  if not held[entry] and #unknown < 1000 then unknown[#unknown + 1] = entry end
end
-- One command for each entry held, not one for each mark: other workers' entries may have 100,000 marks.
if redis.call('EXISTS', KEYS[7]) == 1 then
  for entry in pairs(held) do
    if mine[entry] and redis.call('ZREM', KEYS[7], entry) == 1 then cancelled[#cancelled + 1] = entry end
  end
end
local revision = tonumber(redis.call('HGET', KEYS[8], 'revision') or 0)
-- As is_live of lease.py: the last heartbeat is at most one lease from now, in either direction.
local live = redis.call('ZCOUNT', KEYS[4], now - LEASE, now + LEASE)
local standby = redis.call('ZCOUNT', KEYS[10], now - LEASE, now + LEASE)
return {now, live, due, revision, lost, unknown, cancelled, live - standby}
