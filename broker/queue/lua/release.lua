-- Gives back the entries of a consumer, so that any live worker can claim them: its supervisor saw it die, or the
-- worker itself found entries that it does not know.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET workers   KEYS[5] HASH the worker   KEYS[6] HASH trail
-- KEYS[7] STREAM bell
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs  ARGV[4] lease ms
-- ARGV[5] 1: the consumer has ended: delete it; 2: ring no bell, by which the consumer itself may sleep; 3: both
-- ARGV[6] how the consumer ended, for the trail of the entries that it ran
-- ARGV[7] n, then n entries ('stream:entry id') whose run did not finish: each is charged one attempt
-- then 'but' and the entries to keep, or 'only' and the entries to give back
-- Returns the number of entries given back

local GROUP, CONSUMER, RETURNED, LEASE = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local GONE, RINGS_BELL, HOW = ARGV[5] == '1' or ARGV[5] == '3', ARGV[5] < '2', ARGV[6]
local ATTEMPT = 2
local TRAIL_KEPT_MS, TRAIL_BYTES = 86400000, 4096
-- Most idle workers that are woken.
local RINGS = '4'
-- Longest time that suspects wait for a second live worker, if there was one when their worker died.
local COMPANION_MS = 30000

local started, named = {}, {}
local n = tonumber(ARGV[7])
for i = 8, 7 + n do started[ARGV[i]] = true end
local only = ARGV[8 + n] == 'only'
for i = 9 + n, #ARGV do named[ARGV[i]] = true end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Returns for claim: the batch that died, its size, and until when its jobs wait for a second live worker.
-- As is_live of lease.py: the last heartbeat is at most one lease from now, in either direction.
local function batch()
  local own = tonumber(redis.call('ZSCORE', KEYS[4], CONSUMER))
  local others = redis.call('ZCOUNT', KEYS[4], now - LEASE, now + LEASE)
  if own and math.abs(now - own) <= LEASE then others = others - 1 end
  return string.format('%s@%.0f %d %.0f', CONSUMER, now, n, others > 0 and now + COMPANION_MS or 0)
end
local died_in = n > 0 and batch()

-- Adds a line for a run that did not finish: time, worker, how it ended. pcall: at maxmemory it is given back, too.
local function note(name)
  local line = string.format('%.0f %s %s', now, CONSUMER, HOW)
  local before = redis.call('HGET', KEYS[6], name)
  local lines = before and before .. '\n' .. line or line
  redis.pcall('HSET', KEYS[6], name, string.sub(lines, -TRAIL_BYTES), name .. ':batch', died_in)
  redis.call('PEXPIRE', KEYS[6], TRAIL_KEPT_MS)
end

local released = 0
for stream = 1, 3 do
  local key = KEYS[stream]
  if redis.call('EXISTS', key) == 1 then
    for _, pending in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', 100000, CONSUMER)) do
      local name = stream .. ':' .. pending[1]
      if (named[name] or false) == only then
        local deliveries = pending[4] + (started[name] and ATTEMPT or 0)
        redis.call('XCLAIM', key, GROUP, RETURNED, 0, pending[1], 'RETRYCOUNT', deliveries, 'JUSTID')
        if started[name] then note(name) end
        released = released + 1
      end
    end
    if GONE then redis.call('XGROUP', 'DELCONSUMER', key, GROUP, CONSUMER) end
  end
end
if GONE then
  redis.call('ZREM', KEYS[4], CONSUMER)
  redis.call('DEL', KEYS[5])
  redis.pcall('XGROUP', 'DELCONSUMER', KEYS[7], GROUP, CONSUMER)
end
-- pcall: at maxmemory idle workers find the jobs within a second.
for _ = 1, RINGS_BELL and math.min(released, RINGS) or 0 do
  redis.pcall('XADD', KEYS[7], 'MAXLEN', RINGS, '*', 'returned', released)
end
return released
