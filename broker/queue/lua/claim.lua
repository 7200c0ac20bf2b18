-- Take jobs for one worker within a budget: the most urgent stream first, in each what was given back before new jobs.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STRING paused: while it exists nothing is taken
-- KEYS[5] ZSET workers   KEYS[6] HASH trail: of which batch a suspect is, as release and reclaim wrote it
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4] jobs, ARGV[5] rows, ARGV[6] tokens at most
-- ARGV[7] live workers  ARGV[8] jobs this worker holds  ARGV[9] rows missing in its next micro-batch
-- ARGV[10] 1: this worker holds nothing, so an over-large job or suspects may go to it, alone
-- ARGV[11] the last stream to take new jobs from, ARGV[12] the last one to take returned jobs from: 1 realtime, 3 all
-- ARGV[13], ARGV[14] rows that normal and batch may take before more urgent jobs: their share, saved up
-- ARGV[15] max_attempts  ARGV[16] lease ms  ARGV[17], ARGV[18] rows and tokens of the job that this worker took last
-- ARGV[19], ARGV[20] rows and tokens: a job with more of either that does not fit is for a worker that holds nothing
-- Returns {now_ms, {waiting in each stream}, suspects, 1 if paused, blocked,
--   {stream, entry id, deliveries, fields, 1 if by share, 1 if it was given back}, ...}
--   waiting: jobs left in the streams, new and returned ones
--   suspects: the most urgent stream in which jobs are left for a worker that holds nothing, 0 for none: suspects, or a
--     large job that comes next
--   blocked: the stream whose next job has more rows or tokens than there was room left for, 0 for none
-- Raises NOGROUP, and what its user is not allowed. What an entry holds is never trusted: without usable numbers it
--   counts as one row.

local GROUP, CONSUMER, RETURNED = ARGV[1], ARGV[2], ARGV[3]
local MAX_JOBS, MAX_ROWS, MAX_TOKENS = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LIVE, HELD, NEXT_ROWS, EMPTY_HANDED = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10] == '1'
local LAST_STREAM, LAST_RETURNED = tonumber(ARGV[11]), tonumber(ARGV[12])
local SAVED_ROWS = {0, tonumber(ARGV[13]), tonumber(ARGV[14])}
local MAX_ATTEMPTS, LEASE = tonumber(ARGV[15]), tonumber(ARGV[16])
local LARGE_ROWS, LARGE_TOKENS = tonumber(ARGV[19]), tonumber(ARGV[20])
-- Deliveries count 1 + 2 x attempts + hosts lost; from one attempt on a job is a suspect (see lease.py).
local SUSPECT = 3
-- New jobs that are looked at first, and how many times as many in each page after that.
local FIRST_PAGE, GROWTH = 1, 4
-- Jobs of a stream that were given back and are looked at in one claim, at most, to within a page.
local MOST_RETURNED = 4096
-- A stream whose last job came within this time is in use.
local IN_USE_MS = 10000
-- As release: how long suspects wait for a second live worker, at most.
local COMPANION_MS = 30000

local groups, last, waiting, fresh, innocents, suspects = {}, {}, {}, {}, {}, {}

local function find_group(key)
  local infos = redis.pcall('XINFO', 'GROUPS', key)
  if infos.err and not string.find(string.lower(tostring(infos.err)), 'no such key', 1, true) then return nil, infos end
  for _, info in ipairs(infos) do
    local group = {}
    for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
    if group['name'] == GROUP then return group end
  end
end

-- Pages on until there are as many innocents as may be taken: any number of suspects may lie before them.
local function find_returned(stream)
  local size, from, found = MAX_JOBS + 64, '-', 0
  repeat
    local given_back = redis.call('XPENDING', KEYS[stream], GROUP, from, '+', size, RETURNED)
    for _, pending in ipairs(given_back) do
      local list = pending[4] >= SUSPECT and suspects or innocents
      table.insert(list[stream], pending)
      from = '(' .. pending[1]
    end
    found = found + #given_back
  until #given_back < size or #innocents[stream] >= MAX_JOBS or found >= MOST_RETURNED
  return found
end

local returned = 0
local all_exist = redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[3]) == 3
for stream = 1, 3 do
  local length = redis.call('XLEN', KEYS[stream])
  innocents[stream], suspects[stream], waiting[stream] = {}, {}, 0
  -- An empty stream is not asked about: most of the time two are empty, and each question costs time.
  if length > 0 or not all_exist then
    local group, refused = find_group(KEYS[stream])
    if refused then return refused end
    if not group then return redis.error_reply('NOGROUP no group ' .. GROUP .. ' on ' .. KEYS[stream]) end
    groups[stream], last[stream] = group, group['last-delivered-id']
    -- Clients delete what they cancel and do not acknowledge it: pending entries may be gone from the stream.
    local found = find_returned(stream)
    waiting[stream], returned = math.max(0, length - group['pending'] + found), returned + found
  end
  -- At most: returned ones are among them.
  fresh[stream] = waiting[stream]
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[4]) == 1 then return {now, waiting, 0, 1, 0} end
-- Before the functions below are made, which costs time even if nothing waits.
if waiting[1] + waiting[2] + waiting[3] + returned == 0 then return {now, waiting, 0, 0, 0} end

-- The streams whose next job is large and did not fit.
local large = {}
local taken, rows, tokens, full, blocked, share = {}, 0, 0, false, 0, 0
-- The last job that was looked at, and the rows that may still be taken out of what a class has saved.
local job_rows, job_tokens = math.max(1, tonumber(ARGV[17])), math.max(1, tonumber(ARGV[18]))
local allowance, by_share = math.huge, 0

local function cost(fields)
  local r, t = 1, 0
  -- Where our own clients write them.
  if fields[9] == 'rows' and fields[11] == 'tokens' then
    r, t = tonumber(fields[10]) or 1, tonumber(fields[12]) or 0
  end
  -- Also catches nan: every comparison with it is false.
  if not (r >= 1 and r <= 1e6) then r = 1 end
  if not (t >= 0 and t <= 1e9) then t = 0 end
  job_rows, job_tokens = r, math.max(1, t)
  return r, t
end

-- Beyond its share of all that waits a worker takes only what its next micro-batch lacks: others may be idle.
local function is_full()
  return #taken >= MAX_JOBS or rows >= MAX_ROWS or tokens >= MAX_TOKENS or (#taken >= share and rows >= NEXT_ROWS)
end

-- What does not fit is not overtaken. A large job runs out of what its class has saved once that is a micro-batch.
local function may_take(stream, r, t)
  if full then return false end
  large[stream] = r > LARGE_ROWS or t > LARGE_TOKENS
  local saved = r <= allowance or (large[stream] and allowance >= NEXT_ROWS)
  if saved and #taken == 0 and EMPTY_HANDED then return true end
  if r > allowance then return false end
  if rows + r <= MAX_ROWS and tokens + t <= MAX_TOKENS then return true end
  full, blocked = true, stream
  return false
end

local function take(stream, id, deliveries, fields, r, t, given_back)
  taken[#taken + 1] = {stream, id, deliveries, fields, by_share, given_back}
  rows, tokens, allowance = rows + r, tokens + t, allowance - r
  waiting[stream], large[stream] = waiting[stream] - 1, false
  full = is_full()
end

-- An entry that was given back; nothing where it was deleted since.
local function returned_entry(stream, id)
  local entry = redis.call('XRANGE', KEYS[stream], id, id)[1]
  if entry then return entry[2] end
  redis.call('XACK', KEYS[stream], GROUP, id)
  redis.call('HDEL', KEYS[6], stream .. ':' .. id, stream .. ':' .. id .. ':batch')
end

local function take_returned(stream, pending, fields, r, t)
  redis.call('XCLAIM', KEYS[stream], GROUP, CONSUMER, 0, pending[1], 'JUSTID')
  take(stream, pending[1], pending[4], fields, r, t, 1)
end

local function take_innocents(stream)
  while #innocents[stream] > 0 and not full do
    local pending = innocents[stream][1]
    local fields = returned_entry(stream, pending[1])
    if fields then
      local r, t = cost(fields)
      if not may_take(stream, r, t) then return end
      take_returned(stream, pending, fields, r, t)
    end
    table.remove(innocents[stream], 1)
  end
end

local living

-- The rule of lease.py, is_live: the last beat is at most one lease from now, in either direction.
local function live()
  living = living or redis.call('ZCOUNT', KEYS[5], now - LEASE, now + LEASE)
  return living
end

-- The batch in which a suspect ran last, how many jobs that was, and until when it waits for a second live worker.
local function death(stream, id)
  local name = stream .. ':' .. id
  local noted = redis.call('HGET', KEYS[6], name .. ':batch') or ''
  local batch, size, alone_from = string.match(noted, '^(%S+) (%d+) (%d+)$')
  return batch or name, tonumber(size) or 1, tonumber(alone_from) or 0
end

local function is_urgent_in_use(stream)
  for urgent = 1, stream - 1 do
    local group = groups[urgent] or find_group(KEYS[urgent])
    local id = last[urgent] or (group and group['last-delivered-id']) or '0'
    if now - tonumber(string.match(id, '^%d+')) < IN_USE_MS then return true end
  end
  return false
end

-- If others lived when its worker died, it waits for a second one: the last one left serves what is more urgent.
local function may_run(stream, id)
  if live() >= 2 or not is_urgent_in_use(stream) then return true end
  local _, _, alone_from = death(stream, id)
  -- Further ahead than that: the clock stepped back since.
  return now >= alone_from or alone_from > now + COMPANION_MS
end

-- Groups shrink with each attempt, and the last one is always made alone.
local function group_size(batch_size, deliveries)
  if MAX_ATTEMPTS < 2 then return 1 end
  local attempts = (deliveries - 1) / 2
  return math.max(1, math.floor(batch_size ^ ((MAX_ATTEMPTS - 1 - attempts) / (MAX_ATTEMPTS - 1)) + 1e-9))
end

-- Out of what its class has saved a group runs once that is a micro-batch: it costs a forward of its own.
local function suspect_fits(r, t)
  if #taken == 0 then return allowance >= NEXT_ROWS end
  return #taken < MAX_JOBS and rows + r <= MAX_ROWS and tokens + t <= MAX_TOKENS and r <= allowance
end

-- Suspects of one batch and nothing else, for a worker that holds nothing.
local function take_suspects(stream)
  if #taken > 0 or full or not EMPTY_HANDED then return end
  local group, most
  for _, pending in ipairs(suspects[stream]) do
    local id, deliveries = pending[1], pending[4]
    if group or may_run(stream, id) then
      local batch, size = death(stream, id)
      group = group or batch
      if batch == group then most = math.min(most or size, group_size(size, deliveries)) end
      if #taken >= most then break end
      local fields = batch == group and returned_entry(stream, id)
      if fields then
        local r, t = cost(fields)
        if not suspect_fits(r, t) then break end
        take_returned(stream, pending, fields, r, t)
        pending.taken = true
      end
    end
  end
  full = full or #taken > 0
end

local function find_suspects()
  for stream = 1, 3 do
    if large[stream] then return stream end
    for _, pending in ipairs(suspects[stream]) do
      if not pending.taken and may_run(stream, pending[1]) then return stream end
    end
  end
  return 0
end

-- As XREADGROUP would, but without giving us a second copy of what we looked at.
local function deliver(stream, ids)
  local key, group, words = KEYS[stream], groups[stream], {}
  for _, id in ipairs(ids) do words[#words + 1] = id end
  for _, word in ipairs({'RETRYCOUNT', 1, 'FORCE', 'JUSTID'}) do words[#words + 1] = word end
  redis.call('XCLAIM', key, GROUP, CONSUMER, 0, unpack(words))
  local setid = {'SETID', key, GROUP, ids[#ids]}
  -- Redis 6.2 does not count what a group has read; later ones do, and tell redis-cli the lag by it.
  if group['entries-read'] ~= nil then
    group['entries-read'] = (group['entries-read'] or 0) + #ids
    setid[5], setid[6] = 'ENTRIESREAD', group['entries-read']
  end
  redis.call('XGROUP', unpack(setid))
  last[stream] = ids[#ids]
end

-- Entries to look at: as many as fit if they are like the last one, since to copy a body costs more than to look again.
local function page(size)
  local jobs = math.max(share - #taken, math.ceil((NEXT_ROWS - rows) / job_rows))
  local fitting = math.min(jobs, MAX_JOBS - #taken, (MAX_ROWS - rows) / job_rows, (MAX_TOKENS - tokens) / job_tokens)
  return math.max(1, math.floor(math.min(size, fitting, allowance / job_rows)))
end

-- XREADGROUP knows no rows or tokens: look first, then deliver exactly what fits.
local function take_new(stream)
  if full or fresh[stream] < 1 then return end
  local ids, size, after = {}, FIRST_PAGE, last[stream]
  local function take_each(entries)
    for _, entry in ipairs(entries) do
      local r, t = cost(entry[2])
      if not may_take(stream, r, t) then return false end
      take(stream, entry[1], 1, entry[2], r, t, 0)
      ids[#ids + 1] = entry[1]
    end
    return true
  end

  while not full and #ids < fresh[stream] do
    local count = page(size)
    local entries = redis.call('XRANGE', KEYS[stream], '(' .. after, '+', 'COUNT', count)
    if not take_each(entries) or #entries < count then break end
    size, after = GROWTH * size, entries[#entries][1]
  end
  if #ids > 0 then deliver(stream, ids) end
  fresh[stream] = fresh[stream] - #ids
end

local function take_stream(stream)
  if stream <= LAST_RETURNED then
    take_innocents(stream)
    if #innocents[stream] > 0 then return end
    take_suspects(stream)
  end
  if stream <= LAST_STREAM then take_new(stream) end
end

-- What this worker holds is a part of its share: its neighbours may hold nothing.
share = math.ceil((waiting[1] + waiting[2] + waiting[3] + HELD) / LIVE) - HELD
if EMPTY_HANDED then share = math.max(1, share) end
full = is_full()
for stream = 3, 2, -1 do
  allowance, by_share = SAVED_ROWS[stream], 1
  if allowance > 0 and not full then take_stream(stream) end
end
allowance, by_share = math.huge, 0
for stream = 1, 3 do
  if not full then take_stream(stream) end
end

return {now, waiting, find_suspects(), 0, blocked, unpack(taken)}
