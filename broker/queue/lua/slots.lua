-- Share what is known of a server that already runs, and its slots, between the workers that send requests to it.
-- KEYS[1] HASH of the server: `version`, `state`, and per worker 'w:' consumer -> 'expires running waiting'
-- ARGV[1] consumer  ARGV[2] lease ms, 0: the worker leaves  ARGV[3] requests it has running  ARGV[4] requests it would
--   send besides  ARGV[5] version of the state that it read last  ARGV[6] the state that follows from it, '' for no
--   change  ARGV[7] ttl ms of the key
-- Returns {now_ms, version, state, then consumer, running, waiting of each live worker}
-- The state is written only if nobody else has changed it since the caller read it: of two workers that saw the same
-- refusal one lowers the limit, and the other reads the new one.

local KEY, CONSUMER, LEASE = KEYS[1], ARGV[1], tonumber(ARGV[2])

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local version = tonumber(redis.call('HGET', KEY, 'version') or '') or 0
if ARGV[6] ~= '' and tonumber(ARGV[5]) == version then
  version = version + 1
  redis.call('HSET', KEY, 'state', ARGV[6], 'version', string.format('%.0f', version))
end
if LEASE > 0 then
  local lease = string.format('%.0f %s %s', now + LEASE, ARGV[3], ARGV[4])
  redis.call('HSET', KEY, 'w:' .. CONSUMER, lease)
else
  redis.call('HDEL', KEY, 'w:' .. CONSUMER)
end
redis.call('PEXPIRE', KEY, ARGV[7])

local answer = {now, version, redis.call('HGET', KEY, 'state') or ''}
local fields = redis.call('HGETALL', KEY)
for i = 1, #fields, 2 do
  local consumer = string.match(fields[i], '^w:(.*)$')
  if consumer then
    local expires, running, waiting = string.match(fields[i + 1], '^(%d+) (%d+) (%d+)$')
    -- More than a lease ahead: the clock was set back.
    if expires and tonumber(expires) > now and tonumber(expires) <= now + 60000 then
      answer[#answer + 1] = consumer
      answer[#answer + 1] = tonumber(running)
      answer[#answer + 1] = tonumber(waiting)
    else
      redis.call('HDEL', KEY, fields[i])
    end
  end
end
return answer
