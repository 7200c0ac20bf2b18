-- Part of the scripts of a service with `fair` (scripts.py inserts it): the index of waiting jobs by tenant.
-- The last keys of these scripts: HASH the service   STREAM bell
--   ZSET in_flight: 'TENANT NUL STREAM:ID' of each job that was claimed and is not settled, score 0
--   HASH tenants: 'STREAM:ID' -> its tenant; both have jobs only if the service has max_in_flight
--   and of realtime, normal and batch each
--   ZSET index: 'TENANT NUL ID' of each waiting job, score 0; ID is the entry's, padded with zeros
--   ZSET turn: tenant that has waiting jobs, or had some -> its virtual time
--   ZSET past: tenant without waiting jobs -> its virtual time, while that is ahead; NUL -> the time served last
--   ZSET parked: tenant that has max_in_flight jobs in flight -> when that was seen, server ms; it is not in turn
-- Virtual time is what a tenant was given, in tokens, divided by its weight. The tenant with the least is served first.
-- One that comes starts at the time served last, so it has nothing to catch up; one that comes back, at its own time if
-- that is later. After start-time fair queueing (Goyal, Vin and Cheng, 1996).

local OWN_KEYS = 16
local SPEC, BELL = KEYS[#KEYS - OWN_KEYS + 1], KEYS[#KEYS - OWN_KEYS + 2] -- luacheck: ignore 211
local IN_FLIGHT, TENANTS = KEYS[#KEYS - OWN_KEYS + 3], KEYS[#KEYS - OWN_KEYS + 4] -- luacheck: ignore 211
local INDEX, TURN, PAST, PARKED = {}, {}, {}, {} -- luacheck: ignore 241
for each = 1, 3 do
  INDEX[each], TURN[each] = KEYS[#KEYS - 12 + each], KEYS[#KEYS - 9 + each]
  PAST[each], PARKED[each] = KEYS[#KEYS - 6 + each], KEYS[#KEYS - 3 + each]
end
local LONGEST_TENANT, PAST_KEPT_MS = 64, 86400000 -- luacheck: ignore 211
-- Member of `past` with the time served last: no tenant has this name.
local SERVED = '\0'

-- Entries are not trusted: a name that no client of ours writes counts as no name.
local function known_tenant(name)
  return #name <= LONGEST_TENANT and string.match(name, '^[%w_.-]+$') or ''
end

local function tenant_of(fields) -- luacheck: ignore 211
  for i = 1, #fields - 1, 2 do
    if fields[i] == 'tenant' then return known_tenant(fields[i + 1]) end
  end
  return ''
end

local function member(tenant, id) -- luacheck: ignore 211
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tenant .. '\0' .. string.rep('0', 13 - #ms) .. ms .. '-' .. string.rep('0', 10 - #seq) .. seq
end

-- Makes a tenant wait for its turn, if it does not and is not parked.
local function join(stream, tenant)
  if redis.call('ZSCORE', TURN[stream], tenant) or redis.call('ZSCORE', PARKED[stream], tenant) then return end
  local own, served = unpack(redis.call('ZMSCORE', PAST[stream], tenant, SERVED))
  redis.call('ZADD', TURN[stream], math.max(tonumber(own or 0), tonumber(served or 0)), tenant)
end

-- Ends all turns of a stream of which no job waits. The times stay known.
local function end_turns(stream) -- luacheck: ignore 211
  if redis.call('EXISTS', INDEX[stream]) == 1 then return end
  redis.call('ZUNIONSTORE', PAST[stream], 2, PAST[stream], TURN[stream], 'AGGREGATE', 'MAX')
  redis.call('PEXPIRE', PAST[stream], PAST_KEPT_MS)
  redis.call('DEL', TURN[stream], PARKED[stream])
end

-- Lets a tenant that was parked wait for its turns again. Returns whether it was.
local function unpark(tenant)
  local was = false
  for stream = 1, 3 do
    if redis.call('ZREM', PARKED[stream], tenant) == 1 then
      join(stream, tenant)
      was = true
    end
  end
  return was
end

-- Notes that a job is no more in flight, and wakes a worker if its tenant waited for that.
local function free(stream, id) -- luacheck: ignore 211
  local name = stream .. ':' .. id
  local tenant = redis.call('HGET', TENANTS, name)
  if not tenant then return end
  redis.call('HDEL', TENANTS, name)
  redis.call('ZREM', IN_FLIGHT, tenant .. '\0' .. name)
  if unpark(tenant) then redis.call('XADD', BELL, 'MAXLEN', '16', '*', 'free', '1') end
end
