-- Part of the scripts of a service with `fair` (scripts.py inserts it): the index of waiting jobs by tenant.
-- The last keys of these scripts: HASH the service   STREAM bell   and of realtime, normal and batch each
--   ZSET index: 'TENANT NUL ID' of each waiting job, score 0; ID is the entry's, padded with zeros
--   ZSET turn: tenant that has waiting jobs, or had some -> its virtual time
--   ZSET past: tenant without waiting jobs -> its virtual time, while that is ahead; NUL -> the time served last
-- Virtual time is what a tenant was given, in tokens, divided by its weight. The tenant with the least is served first.
-- One that comes starts at the time served last, so it has nothing to catch up; one that comes back, at its own time if
-- that is later. After start-time fair queueing (Goyal, Vin and Cheng, 1996).

local OWN_KEYS = 11
local SPEC, BELL = KEYS[#KEYS - OWN_KEYS + 1], KEYS[#KEYS - OWN_KEYS + 2] -- luacheck: ignore 211
local INDEX, TURN, PAST = {}, {}, {}
for each = 1, 3 do
  INDEX[each], TURN[each], PAST[each] = KEYS[#KEYS - 9 + each], KEYS[#KEYS - 6 + each], KEYS[#KEYS - 3 + each]
end
local LONGEST_TENANT = 64
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

local function member(tenant, id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tenant .. '\0' .. string.rep('0', 13 - #ms) .. ms .. '-' .. string.rep('0', 10 - #seq) .. seq
end

local function exact(number) return string.format('%.17g', number) end

-- Makes a tenant wait for its turn, if it does not.
local function join(stream, tenant) -- luacheck: ignore 211
  if redis.call('ZSCORE', TURN[stream], tenant) then return end
  local own, served = unpack(redis.call('ZMSCORE', PAST[stream], tenant, SERVED))
  redis.call('ZADD', TURN[stream], exact(math.max(tonumber(own or 0), tonumber(served or 0))), tenant)
end
