-- Claims jobs for one worker within a budget: the most urgent stream first, and in each stream returned jobs first.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STRING paused: while it exists nothing is claimed
-- KEYS[5] ZSET workers   KEYS[6] HASH trail: the batch of each suspect, as release and reclaim wrote it
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4], ARGV[5], ARGV[6] most jobs, rows and tokens
-- ARGV[7] live workers  ARGV[8] jobs this worker holds  ARGV[9] rows missing in its next batch
-- ARGV[10] 1: this worker holds nothing, so it may claim suspects, or one job that exceeds the budget
-- ARGV[11] last stream of new jobs, ARGV[12] last stream of returned jobs: 1 only realtime, 3 all
-- ARGV[13], ARGV[14] rows that normal and batch may take before more urgent jobs: their saved share
-- ARGV[15] max_attempts  ARGV[16] lease ms  ARGV[17], ARGV[18] rows and tokens of the job that this worker claimed last
-- ARGV[19], ARGV[20] rows and tokens: a job that has more of either and does not fit needs a worker that holds nothing
-- Returns {now_ms, {waiting in each stream}, suspects, 1 if paused, blocked,
--   {stream, entry id, deliveries, fields, 1 if by share, 1 if returned}, ...}
--   waiting: jobs that remain, new and returned ones
--   suspects: the most urgent stream whose suspects, or whose next job, a large one, need a worker that holds nothing;
--     0 if there is none
--   blocked: the stream whose next job has more rows or tokens than the budget has room for; 0 if there is none
-- Raises NOGROUP if a group is missing, and errors of missing permissions. Entries are not trusted: one without valid
--   numbers counts as one row.

local GROUP, CONSUMER, RETURNED = ARGV[1], ARGV[2], ARGV[3]
local MAX_JOBS, MAX_ROWS, MAX_TOKENS = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LIVE, HELD, NEXT_ROWS, EMPTY_HANDED = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10] == '1'
local LAST_STREAM, LAST_RETURNED = tonumber(ARGV[11]), tonumber(ARGV[12])
local SAVED_ROWS = {0, tonumber(ARGV[13]), tonumber(ARGV[14])}
local MAX_ATTEMPTS, LEASE = tonumber(ARGV[15]), tonumber(ARGV[16])
local LARGE_ROWS, LARGE_TOKENS = tonumber(ARGV[19]), tonumber(ARGV[20])
-- Deliveries are 1 + 2 x attempts + hosts lost. A job with one attempt or more is a suspect (see lease.py).
local SUSPECT = 3
-- Number of new jobs that are read first, and the growth of each page after that.
local FIRST_PAGE, GROWTH = 1, 4
-- Most returned jobs of a stream that one claim reads, plus at most a page.
local MOST_RETURNED = 4096
-- A stream is in use if its last job came within this time.
local IN_USE_MS = 10000
-- As in release: longest time that suspects wait for a second live worker.
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

-- Reads pages until there are enough innocents, jobs that are not suspects: many suspects may lie before them.
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
  -- Skips the commands for an empty stream: usually two are empty, and each command costs time.
  if length > 0 or not all_exist then
    local group, refused = find_group(KEYS[stream])
    if refused then return refused end
    if not group then return redis.error_reply('NOGROUP no group ' .. GROUP .. ' on ' .. KEYS[stream]) end
    groups[stream], last[stream] = group, group['last-delivered-id']
    -- Clients delete cancelled jobs without XACK, so pending entries may be missing in the stream.
    local found = find_returned(stream)
    waiting[stream], returned = math.max(0, length - group['pending'] + found), returned + found
  end
  -- An upper limit of new jobs: returned ones are included.
  fresh[stream] = waiting[stream]
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[4]) == 1 then return {now, waiting, 0, 1, 0} end
-- Returns before the functions below are created, which costs time.
if waiting[1] + waiting[2] + waiting[3] + returned == 0 then return {now, waiting, 0, 0, 0} end

-- Streams whose next job is large and did not fit.
local large = {}
local claims, rows, tokens, full, blocked, share = {}, 0, 0, false, 0, 0
-- Rows and tokens of the last job read, and the remaining rows of the class's saved share.
local job_rows, job_tokens = math.max(1, tonumber(ARGV[17])), math.max(1, tonumber(ARGV[18]))
local allowance, by_share = math.huge, 0

local function cost(fields)
  local r, t = 1, 0
  -- The positions at which millstream's clients write them.
  if fields[9] == 'rows' and fields[11] == 'tokens' then
    r, t = tonumber(fields[10]) or 1, tonumber(fields[12]) or 0
  end
  -- `not` also rejects nan: every comparison with it is false.
  if not (r >= 1 and r <= 1e6) then r = 1 end
  if not (t >= 0 and t <= 1e9) then t = 0 end
  job_rows, job_tokens = r, math.max(1, t)
  return r, t
end

-- Beyond its share of all waiting jobs a worker only fills its next batch: other workers may be idle.
local function is_full()
  return #claims >= MAX_JOBS or rows >= MAX_ROWS or tokens >= MAX_TOKENS or (#claims >= share and rows >= NEXT_ROWS)
end

-- No job overtakes one that does not fit. A large job may run once its class has saved a batch of rows.
local function may_take(stream, r, t)
  if full then return false end
  large[stream] = r > LARGE_ROWS or t > LARGE_TOKENS
  local saved = r <= allowance or (large[stream] and allowance >= NEXT_ROWS)
  if saved and #claims == 0 and EMPTY_HANDED then return true end
  if r > allowance then return false end
  if rows + r <= MAX_ROWS and tokens + t <= MAX_TOKENS then return true end
  full, blocked = true, stream
  return false
end

local function take(stream, id, deliveries, fields, r, t, is_returned)
  claims[#claims + 1] = {stream, id, deliveries, fields, by_share, is_returned}
  rows, tokens, allowance = rows + r, tokens + t, allowance - r
  waiting[stream], large[stream] = waiting[stream] - 1, false
  full = is_full()
end

-- Returns the fields of a returned entry; nothing, and forgets the entry, if it was deleted since.
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

-- As is_live of lease.py: the last heartbeat is at most one lease from now, in either direction.
local function live()
  living = living or redis.call('ZCOUNT', KEYS[5], now - LEASE, now + LEASE)
  return living
end

-- Returns the batch in which a suspect ran last, its number of jobs, and until when it waits for a second live worker.
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

-- If other workers were alive when its worker died, a suspect waits for a second one: while only one is alive, that one
-- runs more urgent jobs.
local function may_run(stream, id)
  if live() >= 2 or not is_urgent_in_use(stream) then return true end
  local _, _, alone_from = death(stream, id)
  -- A time further ahead means that the clock stepped back since.
  return now >= alone_from or alone_from > now + COMPANION_MS
end

-- Groups shrink with each attempt, and a job always runs alone in its last attempt.
local function group_size(batch_size, deliveries)
  if MAX_ATTEMPTS < 2 then return 1 end
  local attempts = (deliveries - 1) / 2
  return math.max(1, math.floor(batch_size ^ ((MAX_ATTEMPTS - 1 - attempts) / (MAX_ATTEMPTS - 1)) + 1e-9))
end

-- A group of suspects runs once its class has saved a batch of rows: it costs a forward of its own.
local function suspect_fits(r, t)
  if #claims == 0 then return allowance >= NEXT_ROWS end
  return #claims < MAX_JOBS and rows + r <= MAX_ROWS and tokens + t <= MAX_TOKENS and r <= allowance
end

-- Claims suspects of one batch and nothing else, if the worker holds nothing.
local function take_suspects(stream)
  if #claims > 0 or full or not EMPTY_HANDED then return end
  local group, most
  for _, pending in ipairs(suspects[stream]) do
    local id, deliveries = pending[1], pending[4]
    if group or may_run(stream, id) then
      local batch, size = death(stream, id)
      group = group or batch
      if batch == group then most = math.min(most or size, group_size(size, deliveries)) end
      if #claims >= most then break end
      local fields = batch == group and returned_entry(stream, id)
      if fields then
        local r, t = cost(fields)
        if not suspect_fits(r, t) then break end
        take_returned(stream, pending, fields, r, t)
        pending.is_claimed = true
      end
    end
  end
  full = full or #claims > 0
end

local function find_suspects()
  for stream = 1, 3 do
    if large[stream] then return stream end
    for _, pending in ipairs(suspects[stream]) do
      if not pending.is_claimed and may_run(stream, pending[1]) then return stream end
    end
  end
  return 0
end

-- Delivers entries as XREADGROUP does, but does not return a second copy of those that XRANGE returned.
local function deliver(stream, ids)
  local key, group, words = KEYS[stream], groups[stream], {}
  for _, id in ipairs(ids) do words[#words + 1] = id end
  for _, word in ipairs({'RETRYCOUNT', 1, 'FORCE', 'JUSTID'}) do words[#words + 1] = word end
  redis.call('XCLAIM', key, GROUP, CONSUMER, 0, unpack(words))
  local setid = {'SETID', key, GROUP, ids[#ids]}
  -- Later versions than Redis 6.2 count the entries that a group has read, and compute its lag from that.
  if group['entries-read'] ~= nil then
    group['entries-read'] = (group['entries-read'] or 0) + #ids
    setid[5], setid[6] = 'ENTRIESREAD', group['entries-read']
  end
  redis.call('XGROUP', unpack(setid))
  last[stream] = ids[#ids]
end

-- Returns how many entries to read: those that fit if they are like the last job. Copying a body costs more than a
-- second XRANGE.
local function page(size)
  local jobs = math.max(share - #claims, math.ceil((NEXT_ROWS - rows) / job_rows))
  local fitting = math.min(jobs, MAX_JOBS - #claims, (MAX_ROWS - rows) / job_rows, (MAX_TOKENS - tokens) / job_tokens)
  return math.max(1, math.floor(math.min(size, fitting, allowance / job_rows)))
end

-- Reads first and then delivers exactly the entries that fit: XREADGROUP cannot limit rows or tokens.
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

-- fair parts

local function take_stream(stream)
  if stream <= LAST_RETURNED then
    take_innocents(stream)
    if #innocents[stream] > 0 then return end
    take_suspects(stream)
  end
  if stream <= LAST_STREAM then take_new(stream) end
end

-- The jobs that this worker holds are part of its share: other workers may hold none.
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

return {now, waiting, find_suspects(), 0, blocked, unpack(claims)}
