-- Hold the lease of the one supervisor that drives a canary, and write the canary's state if nobody else has since.
-- KEYS[1] HASH of the route's canary: `run`, `driver`, `until` (server ms), `state`
-- ARGV[1] run  ARGV[2] driver  ARGV[3] lease ms  ARGV[4] the state that the decision was made from, '' for none
-- ARGV[5] the state that follows, '' for no change
-- Returns {1 if the driver holds the lease and the state is as it wants, else 0; now_ms; the state}
-- A late driver changes nothing: another one holds the lease, or the state is not the one that it has read.

local KEY, RUN, DRIVER, LEASE, READ, NEXT = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local found = redis.call('HMGET', KEY, 'run', 'driver', 'until', 'state')
local expires, state = tonumber(found[3] or '') or 0, found[4] or ''
-- More than a minute ahead: the clock was set back.
local is_held = expires > now and expires <= now + 60000
if found[1] ~= RUN or (is_held and found[2] ~= DRIVER) then return {0, now, state} end
if NEXT ~= '' then
  if not is_held or state ~= READ then return {0, now, state} end
  state = NEXT
  redis.call('HSET', KEY, 'state', state)
end
redis.call('HSET', KEY, 'driver', DRIVER, 'until', string.format('%.0f', now + LEASE))
return {1, now, state}
