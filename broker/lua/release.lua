-- Give back what a consumer holds, for any live worker to claim: its supervisor saw it die, or it lost track itself.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET workers   KEYS[5] HASH the worker
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4] 1: the consumer is gone for good, forget it
-- ARGV[5] n, then n entries ('stream:entry id') whose run was cut off: one attempt each
-- then 'but' and the entries to keep, or 'only' and the entries to give back
-- Returns the number of entries given back

local GROUP, CONSUMER, RETURNED, GONE = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local ATTEMPT = 2

local started, named = {}, {}
local n = tonumber(ARGV[5])
for i = 6, 5 + n do started[ARGV[i]] = true end
local only = ARGV[6 + n] == 'only'
for i = 7 + n, #ARGV do named[ARGV[i]] = true end

local released = 0
for stream = 1, 3 do
  local key = KEYS[stream]
  if redis.call('EXISTS', key) == 1 then
    for _, pending in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', 100000, CONSUMER)) do
      local name = stream .. ':' .. pending[1]
      if (named[name] or false) == only then
        local deliveries = pending[4] + (started[name] and ATTEMPT or 0)
        redis.call('XCLAIM', key, GROUP, RETURNED, 0, pending[1], 'RETRYCOUNT', deliveries, 'JUSTID')
        released = released + 1
      end
    end
    if GONE then redis.call('XGROUP', 'DELCONSUMER', key, GROUP, CONSUMER) end
  end
end
if GONE then
  redis.call('ZREM', KEYS[4], CONSUMER)
  redis.call('DEL', KEYS[5])
end
return released
