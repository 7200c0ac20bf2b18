-- Part of claim_fair, behind fair.lua: new jobs are taken from the index, the tenant with the least virtual time first.
-- A job that waits is behind the group's cursor or not; it is in the index, or enqueue did not write it (redis-cli, an
-- older client). The cursor moves to the stream's end while the index has all that wait. Otherwise pages behind the
-- cursor are read and indexed; if the end is reached and jobs are still missing, reading starts again at the front.
-- An entry may be in the index though somebody holds it: a worker without this script took it. It is not taken again.

local NEVER_IDLE_MS = '4000000000000000'
local PAGE, RETURN_PAGE = 100, 500
-- Number of tenants that are loaded first, and then at a time.
local FIRST_TENANTS, MORE_TENANTS = 4, 16
-- Time after which a parked tenant is looked at again: a worker without settle_fair may have ended its jobs.
local LOOK_MS = 1000
-- Most entries and tenants without jobs that one claim finds and removes.
local MOST_STALE = 1000
-- Members of a tenant that are read first, and then at a time.
local MEMBERS = {'2', '8', '32', '128'}

local fairness, weighted, most_in_flight = unpack(redis.call('HMGET', SPEC, 'fair', 'fair_weights', 'max_in_flight'))
weighted, most_in_flight = tonumber(weighted or 0) > 0, tonumber(most_in_flight or '')

local function entry_id(of)
  local ms, seq = string.match(of, '%z0*(%d+)%-0*(%d+)$')
  return ms and ms .. '-' .. seq or '0-0'
end

-- Makes new entries pending for `consumer`, if nobody holds them. Returns the ids of those that are.
local function hold(stream, ids, consumer)
  local words = {}
  for _, id in ipairs(ids) do words[#words + 1] = id end
  for _, word in ipairs({'RETRYCOUNT', 1, 'FORCE', 'JUSTID'}) do words[#words + 1] = word end
  local held = {}
  for _, id in ipairs(redis.call('XCLAIM', KEYS[stream], GROUP, consumer, NEVER_IDLE_MS, unpack(words))) do
    held[id] = true
  end
  return held
end

-- Delivers new entries, and drops the claims of those that somebody holds.
local function deliver_free(stream, ids)
  local held, missing = hold(stream, ids, CONSUMER), 0
  for at = #claims, 1, -1 do
    local claimed = claims[at]
    if claimed[1] == stream and claimed[6] == 0 and not claimed.is_held then
      claimed.is_held = held[claimed[2]]
      if not claimed.is_held then
        table.remove(claims, at)
        missing = missing + 1
      end
    end
  end
  groups[stream]['pending'] = groups[stream]['pending'] + #ids - missing
  return held
end

-- Indexes a page of entries behind the cursor. Those that somebody holds are left out. If there are none and the index
-- lacks some, the next claims begin at the front.
local function index_page(stream, lacks)
  local entries = redis.call('XRANGE', KEYS[stream], '(' .. last[stream], '+', 'COUNT', PAGE)
  -- First a write that is allowed at maxmemory: then so are the writes after it.
  redis.call('ZREM', INDEX[stream], '')
  if #entries == 0 then
    if lacks then redis.call('XGROUP', 'SETID', KEYS[stream], GROUP, '0') end
    return
  end
  local held, newest = {}, entries[#entries][1]
  for _, pending in ipairs(redis.call('XPENDING', KEYS[stream], GROUP, entries[1][1], newest, PAGE)) do
    held[pending[1]] = true
  end
  for _, entry in ipairs(entries) do
    if not held[entry[1]] then
      local tenant = tenant_of(entry[2])
      redis.call('ZADD', INDEX[stream], 0, member(tenant, entry[1]))
      join(stream, tenant)
    end
  end
  last[stream] = newest
  redis.call('XGROUP', 'SETID', KEYS[stream], GROUP, newest)
end

-- Returns how many more jobs are in the index than wait in the stream.
local function surplus(stream)
  return redis.call('ZCARD', INDEX[stream]) - redis.call('XLEN', KEYS[stream]) + groups[stream]['pending']
end

local function is_before(one, other)
  return one.time < other.time or (one.time == other.time and one.name < other.name)
end

-- Puts a tenant in its place among those that are loaded.
local function place(queue, tenant)
  local list = queue.list
  local at = #list + 1
  while at > queue.head and is_before(tenant, list[at - 1]) do
    list[at] = list[at - 1]
    at = at - 1
  end
  list[at] = tenant
end

-- Returns the weights of tenants that have one of their own, as text, by their position in `found`.
local function weights_of(found)
  if not weighted or #found == 0 then return {} end
  local names = {}
  for i = 1, #found, 2 do names[#names + 1] = 'weight:' .. found[i] end
  return redis.call('HMGET', SPEC, unpack(names))
end

local function load_tenants(stream, queue)
  local size = queue.loaded == 0 and FIRST_TENANTS or MORE_TENANTS
  local found = redis.call('ZRANGE', TURN[stream], queue.loaded, queue.loaded + size - 1, 'WITHSCORES')
  local weights = weights_of(found)
  for i = 1, #found, 2 do
    -- All fields at once: a table that grows costs as much as a command.
    place(queue, {name = found[i], time = tonumber(found[i + 1]), weight = tonumber(weights[(i + 1) / 2] or 1) or 1,
      members = {}, at = 1, page = 1, last = false, is_done = false, in_flight = false, is_touched = false})
  end
  if #found > 0 then queue.horizon = {name = found[#found - 1], time = tonumber(found[#found])} end
  queue.loaded, queue.all = queue.loaded + #found / 2, #found < 2 * size
end

-- Returns the tenant with the least time. Tenants are loaded as far as one of them may be it.
local function next_tenant(stream, queue)
  while not queue.all and (not queue.list[queue.head] or is_before(queue.horizon, queue.list[queue.head])) do
    load_tenants(stream, queue)
  end
  return queue.list[queue.head]
end

-- Returns the oldest member of a tenant in the index; nil if it has none.
local function oldest(stream, tenant)
  local members = tenant.members
  while tenant.at > #members do
    if tenant.is_done then return nil end
    local from, size = tenant.last and '(' .. tenant.last or '[' .. tenant.name .. '\0', MEMBERS[tenant.page]
    members = redis.call('ZRANGEBYLEX', INDEX[stream], from, '(' .. tenant.name .. '\1', 'LIMIT', '0', size)
    tenant.members, tenant.at, tenant.last = members, 1, members[#members] or tenant.last
    tenant.is_done, tenant.page = #members < tonumber(size), math.min(tenant.page + 1, #MEMBERS)
  end
  return members[tenant.at]
end

local function count_in_flight(tenant)
  return redis.call('ZLEXCOUNT', IN_FLIGHT, '[' .. tenant .. '\0', '(' .. tenant .. '\1')
end

-- Tells if a tenant has as many jobs in flight as it may.
local function is_at_most(tenant)
  if not most_in_flight then return false end
  tenant.in_flight = tenant.in_flight or count_in_flight(tenant.name)
  return tenant.in_flight >= most_in_flight
end

-- Notes that what the server has of a tenant changes.
local function touch(queue, tenant)
  if tenant.is_touched then return end
  tenant.is_touched = true
  queue.touched[#queue.touched + 1] = tenant
end

-- Parks a tenant that is next, until one of its jobs is settled.
local function park(queue, tenant)
  touch(queue, tenant)
  tenant.is_parked, queue.head = true, queue.head + 1
  queue.parked[#queue.parked + 1], queue.parked[#queue.parked + 2] = now, tenant.name
end

-- Looks whether the jobs in flight of one parked tenant are still pending, and forgets the others.
local function check_parked(stream)
  local tenant = redis.call('ZRANGEBYSCORE', PARKED[stream], '-inf', now - LOOK_MS, 'LIMIT', 0, 1)[1]
  if not tenant then return end
  -- First a write that is allowed at maxmemory.
  redis.call('ZREM', PARKED[stream], tenant)
  for _, found in ipairs(redis.call('ZRANGEBYLEX', IN_FLIGHT, '[' .. tenant .. '\0', '(' .. tenant .. '\1')) do
    local name = string.match(found, '%z(.*)$')
    local id = string.sub(name, 3)
    if not redis.call('XPENDING', KEYS[tonumber(string.sub(name, 1, 1))], GROUP, id, id, 1)[1] then
      redis.call('ZREM', IN_FLIGHT, found)
      redis.call('HDEL', TENANTS, name)
    end
  end
  if not most_in_flight or count_in_flight(tenant) < most_in_flight then
    join(stream, tenant)
    unpark(tenant)
  else
    redis.call('ZADD', PARKED[stream], now, tenant)
  end
end

-- Notes what was delivered as in flight.
local function note_in_flight(stream, takers, held)
  local members, names = {}, {}
  for id, tenant in pairs(takers) do
    if held[id] then
      local name = stream .. ':' .. id
      members[#members + 1], members[#members + 2] = 0, tenant .. '\0' .. name
      names[#names + 1], names[#names + 2] = name, tenant
    end
  end
  if #names == 0 then return end
  redis.call('ZADD', IN_FLIGHT, unpack(members))
  redis.call('HSET', TENANTS, unpack(names))
  redis.call('PEXPIRE', IN_FLIGHT, PAST_KEPT_MS)
  redis.call('PEXPIRE', TENANTS, PAST_KEPT_MS)
end

-- Writes what the claim changed: taken members, and the times of tenants.
local function write_turns(stream, queue)
  if #queue.gone > 0 then redis.call('ZREM', INDEX[stream], unpack(queue.gone)) end
  if #queue.touched == 0 then return end
  local turns, ended, past = {}, {}, {queue.served, SERVED}
  for _, tenant in ipairs(queue.touched) do
    local words = not tenant.is_parked and oldest(stream, tenant) and turns or past
    words[#words + 1], words[#words + 2] = tenant.time, tenant.name
    if words == past then ended[#ended + 1] = tenant.name end
  end
  if #ended > 0 then redis.call('ZREM', TURN[stream], unpack(ended)) end
  if #turns > 0 then redis.call('ZADD', TURN[stream], unpack(turns)) end
  if #queue.parked > 0 then redis.call('ZADD', PARKED[stream], unpack(queue.parked)) end
  redis.call('ZADD', PAST[stream], unpack(past))
  redis.call('ZREMRANGEBYSCORE', PAST[stream], '-inf', string.format('(%.17g', queue.served))
  redis.call('PEXPIRE', PAST[stream], PAST_KEPT_MS)
  if #turns == 0 then end_turns(stream) end
end

-- Charges a tenant for a job that was taken, or skips one that is gone, and moves on to its next one.
local function advance(queue, tenant, charged)
  queue.gone[#queue.gone + 1] = tenant.members[tenant.at]
  tenant.at = tenant.at + 1
  touch(queue, tenant)
  if charged == 0 then return end
  queue.served, queue.head = tenant.time, queue.head + 1
  tenant.time = tenant.time + charged / tenant.weight
  place(queue, tenant)
end

-- Returns an entry that is in its stream and that nobody holds. It may be held only if the index has too many.
local function free_entry(stream, id, too_many)
  if too_many and redis.call('XPENDING', KEYS[stream], GROUP, id, id, 1)[1] then return nil end
  return redis.call('XRANGE', KEYS[stream], id, id)[1]
end

-- Returns the ids of the jobs that were taken, and the tenant of each.
local function take_in_turn(stream, queue, too_many)
  local ids, takers, stale = {}, {}, 0
  local tenant = next_tenant(stream, queue)
  -- Somebody deleted `turn`, or the server evicted it. A parked tenant stays parked.
  local lost = not tenant and redis.call('ZRANGE', INDEX[stream], 0, 0)[1]
  if lost then join(stream, string.match(lost, '^[^%z]*')) end
  while tenant and not full and stale < MOST_STALE do
    local found = not is_at_most(tenant) and oldest(stream, tenant)
    local id = found and entry_id(found)
    local entry = id and free_entry(stream, id, too_many)
    if entry then
      local r, t = cost(entry[2])
      if not may_take(stream, r, t) then break end
      take(stream, id, 1, entry[2], r, t, 0)
      ids[#ids + 1], takers[id] = id, tenant.name
      tenant.in_flight = tenant.in_flight and tenant.in_flight + 1
      advance(queue, tenant, job_tokens)
    elseif found then
      stale = stale + 1
      advance(queue, tenant, 0)
    elseif is_at_most(tenant) then
      park(queue, tenant)
    else
      stale = stale + 1
      touch(queue, tenant)
      queue.head = queue.head + 1
    end
    tenant = not full and next_tenant(stream, queue)
  end
  return ids, takers
end

local function take_fairly(stream)
  if full or fresh[stream] < 1 then return end
  local extra = surplus(stream)
  if extra ~= 0 then
    index_page(stream, extra < 0)
    extra = surplus(stream)
  end
  if most_in_flight or redis.call('EXISTS', PARKED[stream]) == 1 then check_parked(stream) end
  local served = tonumber(redis.call('ZSCORE', PAST[stream], SERVED) or 0)
  local queue = {list = {}, head = 1, loaded = 0, all = false, served = served, gone = {}, touched = {}, parked = {}}
  local ids, takers = take_in_turn(stream, queue, extra > 0)
  write_turns(stream, queue)
  if #ids == 0 then return end
  local held = deliver_free(stream, ids)
  if most_in_flight then note_in_flight(stream, takers, held) end
  if extra == 0 then
    redis.call('XGROUP', 'SETID', KEYS[stream], GROUP, '$')
    last[stream] = ids[#ids]
  end
  fresh[stream] = fresh[stream] - #ids
end

-- Gives back a page of the index of a service whose `fair` was removed: jobs before the cursor become returned ones,
-- the others are new ones again.
local function dissolve(stream)
  local members = redis.call('ZRANGE', INDEX[stream], 0, RETURN_PAGE - 1)
  if #members == 0 then return end
  local ids, cursor = {}, string.match(member('', last[stream]), '%z(.*)$')
  for _, found in ipairs(members) do
    local id = entry_id(found)
    if string.match(found, '%z(.*)$') <= cursor and redis.call('XRANGE', KEYS[stream], id, id)[1] then
      ids[#ids + 1] = id
    end
  end
  redis.call('ZREM', INDEX[stream], unpack(members))
  if #ids > 0 then hold(stream, ids, RETURNED) end
  if redis.call('EXISTS', INDEX[stream]) == 0 then redis.call('DEL', TURN[stream], PAST[stream], PARKED[stream]) end
end

if fairness == 'tenant' then
  take_new = take_fairly
else
  deliver = function(stream, ids)
    deliver_free(stream, ids)
    redis.call('XGROUP', 'SETID', KEYS[stream], GROUP, ids[#ids])
    last[stream] = ids[#ids]
  end
  for stream = 1, 3 do
    if groups[stream] then dissolve(stream) end
  end
end
