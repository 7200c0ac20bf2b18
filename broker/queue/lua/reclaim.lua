-- Gives back the entries of workers on lost hosts: those with no heartbeat and no renewed entry for a whole lease.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET workers   KEYS[5] STRING reclaim: 'last pass:hold until', ms
-- KEYS[6] HASH trail: how the runs of an entry ended, and the batch it ran in last
-- KEYS[7] STREAM bell
-- ARGV[1] group  ARGV[2] consumer of returned jobs  ARGV[3] lease ms
-- Returns {state, entries given back}; the state is 'early', 'holding' or 'done'

local GROUP, RETURNED, LEASE = ARGV[1], ARGV[2], tonumber(ARGV[3])
local EVERY_MS, HOUR_MS, PER_PASS, SPARE_CONSUMERS = 900, 3600000, 1000, 16
-- Half an attempt in the delivery count: nobody knows which of its entries a lost host was running.
local HALF_ATTEMPT = 1
local TRAIL_KEPT_MS, TRAIL_BYTES = 86400000, 4096
-- As in release: most idle workers that are woken; longest time that suspects wait for a second live worker, if there
-- is one now.
local RINGS = '4'
local COMPANION_MS = 30000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local last, hold_until = string.match(redis.call('GET', KEYS[5]) or '', '^(%d+):(%d+)$')
last, hold_until = tonumber(last) or 0, tonumber(hold_until) or 0
if now >= last and now - last < EVERY_MS then return {'early', 0} end
-- If there was no pass for a while, the server was down or frozen, or its clock stepped: live workers first get one
-- lease to send heartbeats.
if now < last or now - last > LEASE / 2 then hold_until = now + LEASE end
if hold_until > now + LEASE then hold_until = now + LEASE end
-- DEL first: at maxmemory it is allowed, and then so are the writes after it.
redis.call('DEL', KEYS[5])
redis.call('SET', KEYS[5], string.format('%.0f:%.0f', now, hold_until), 'PX', HOUR_MS)

-- Restarts the idle time of all pending entries: after the clock stepped back, an entry with a later delivery time
-- would not become idle.
local function restamp(key)
  for _, entry in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', 100000)) do
    redis.call('XCLAIM', key, GROUP, entry[2], 0, entry[1], 'JUSTID')
  end
end

if now < last then
  for stream = 1, 3 do
    if redis.call('EXISTS', KEYS[stream]) == 1 then restamp(KEYS[stream]) end
  end
end
if now < hold_until then return {'holding', 0} end

-- As is_live of lease.py: the last heartbeat is at most one lease from now, in either direction.
local function lives(consumer)
  local beat = tonumber(redis.call('ZSCORE', KEYS[4], consumer))
  return beat and math.abs(now - beat) <= LEASE
end

local function field_of(info, field)
  for i = 1, #info, 2 do
    if info[i] == field then return info[i + 1] end
  end
end

local function count_consumers(key)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    if field_of(group, 'name') == GROUP then return field_of(group, 'consumers') end
  end
  return 0
end

local returned, holders, streams = 0, {}, {}

-- Returns the batch for claim: all entries that the lost worker held count as one batch.
local function batch(consumer, size)
  local others = redis.call('ZCOUNT', KEYS[4], now - LEASE, now + LEASE)
  return string.format('%s@%.0f %d %.0f', consumer, now, size, others > 0 and now + COMPANION_MS or 0)
end

local function note(name, consumer, died_in)
  local line = string.format('%.0f %s was lost with its host', now, consumer)
  local before = redis.call('HGET', KEYS[6], name)
  local lines = before and before .. '\n' .. line or line
  redis.pcall('HSET', KEYS[6], name, string.sub(lines, -TRAIL_BYTES), name .. ':batch', died_in)
  redis.call('PEXPIRE', KEYS[6], TRAIL_KEPT_MS)
end

local function give_back(stream, key, consumer)
  local pending = redis.call('XPENDING', key, GROUP, 'IDLE', LEASE, '-', '+', PER_PASS, consumer)
  local died_in = batch(consumer, #pending)
  for _, entry in ipairs(pending) do
    local deliveries = entry[4] + HALF_ATTEMPT
    redis.call('XCLAIM', key, GROUP, RETURNED, 0, entry[1], 'RETRYCOUNT', deliveries, 'JUSTID')
    note(stream .. ':' .. entry[1], consumer, died_in)
  end
  returned = returned + #pending
end

local function forget(consumer)
  for _, key in ipairs(streams) do redis.call('XGROUP', 'DELCONSUMER', key, GROUP, consumer) end
  redis.pcall('XGROUP', 'DELCONSUMER', KEYS[7], GROUP, consumer)
  redis.call('ZREM', KEYS[4], consumer)
end

-- XPENDING lists only consumers that hold entries. XINFO CONSUMERS lists all: it takes 25 ms for 4,000 consumers.
for stream = 1, 3 do
  local key = KEYS[stream]
  if redis.call('EXISTS', key) == 1 then
    streams[#streams + 1] = key
    for _, holder in ipairs(redis.call('XPENDING', key, GROUP)[4] or {}) do
      local name = holder[1]
      if holders[name] == nil then holders[name] = lives(name) or false end
      if name ~= RETURNED and not holders[name] then give_back(stream, key, name) end
    end
  end
end

local function forget_the_dead(lowest, highest)
  for _, name in ipairs(redis.call('ZRANGE', KEYS[4], lowest, highest, 'BYSCORE', 'LIMIT', 0, PER_PASS)) do
    if holders[name] == nil then forget(name) end
  end
end
forget_the_dead('-inf', string.format('(%.0f', now - LEASE))
forget_the_dead(string.format('(%.0f', now + LEASE), '+inf')

-- Deletes consumers that hold nothing and have no heartbeat, such as one that a read created after its worker was
-- released. Finding them lists all consumers, so it waits until they outnumber the others.
local known = redis.call('ZCOUNT', KEYS[4], '-inf', '+inf')
for _, key in ipairs(streams) do
  if count_consumers(key) > 2 * known + SPARE_CONSUMERS then
    for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', key, GROUP)) do
      local name = field_of(info, 'name')
      if name ~= RETURNED and field_of(info, 'pending') == 0 and not lives(name) then
        redis.call('XGROUP', 'DELCONSUMER', key, GROUP, name)
        redis.pcall('XGROUP', 'DELCONSUMER', KEYS[7], GROUP, name)
      end
    end
  end
end
-- As release.
for _ = 1, math.min(returned, RINGS) do redis.pcall('XADD', KEYS[7], 'MAXLEN', RINGS, '*', 'returned', returned) end
return {'done', returned}
