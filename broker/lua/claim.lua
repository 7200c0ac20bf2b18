-- Take jobs for one worker: all that others gave back first, then new ones, most urgent stream first, within a budget.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STRING paused: while it exists nothing is taken
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4] jobs, ARGV[5] rows, ARGV[6] tokens at most   ARGV[7] live workers
-- ARGV[8] 1: this worker holds nothing, so an over-large or a suspect job may go to it, alone
-- ARGV[9] the last stream to take new jobs from, ARGV[12] the last one to take returned jobs from: 1 realtime, 3 all
-- ARGV[10], ARGV[11] rows that normal and batch may take before their betters: their share, saved up
-- Returns {now_ms, {waiting in each stream}, suspects, 1 if paused, blocked,
--   {stream, entry id, deliveries, fields, 1 if by share}, ...}
--   waiting: new jobs left in the streams; suspects: returned jobs left that wait for a worker that holds nothing;
--   blocked: the stream whose next job has more rows or tokens than there was room left for, 0 for none
-- Raises NOGROUP, and what its user is not allowed. What an entry holds is never trusted: without usable numbers it
--   counts as one row.

local GROUP, CONSUMER, RETURNED = ARGV[1], ARGV[2], ARGV[3]
local MAX_JOBS, MAX_ROWS, MAX_TOKENS = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LIVE, EMPTY_HANDED = tonumber(ARGV[7]), ARGV[8] == '1'
local LAST_STREAM, LAST_RETURNED = tonumber(ARGV[9]), tonumber(ARGV[12])
local SAVED_ROWS = {0, tonumber(ARGV[10]), tonumber(ARGV[11])}
-- Deliveries count 1 + 2 x attempts + hosts lost; from one attempt on a job runs alone (see lease.py).
local SUSPECT = 3
local FIRST_PAGE = 4

local taken = {}
local rows, tokens, full, blocked = 0, 0, false, 0

local function cost(fields)
  local r, t = 1, 0
  -- Where our own clients write them.
  if fields[9] == 'rows' and fields[11] == 'tokens' then
    r, t = tonumber(fields[10]) or 1, tonumber(fields[12]) or 0
  end
  -- Also catches nan: every comparison with it is false.
  if not (r >= 1 and r <= 1e6) then r = 1 end
  if not (t >= 0 and t <= 1e9) then t = 0 end
  return r, t
end

local function fits(r, t)
  if #taken == 0 and EMPTY_HANDED then return true end
  return #taken < MAX_JOBS and rows + r <= MAX_ROWS and tokens + t <= MAX_TOKENS
end

local function take(stream, id, deliveries, fields, r, t, by_share)
  taken[#taken + 1] = {stream, id, deliveries, fields, by_share and 1 or 0}
  rows, tokens = rows + r, tokens + t
  full = #taken >= MAX_JOBS or rows >= MAX_ROWS or tokens >= MAX_TOKENS
end

local suspects, took_suspect = 0, false

local function take_returned(stream)
  local key = KEYS[stream]
  for _, pending in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', MAX_JOBS + 64, RETURNED)) do
    local id, deliveries = pending[1], pending[4]
    local alone = deliveries >= SUSPECT
    if alone and (#taken > 0 or not EMPTY_HANDED) then
      suspects = suspects + 1
    elseif #taken < MAX_JOBS and not took_suspect then
      local entry = redis.call('XRANGE', key, id, id)[1]
      if not entry then
        redis.call('XACK', key, GROUP, id)
      else
        -- Beyond rows and tokens: they waited once already, and what a dead worker held is bounded.
        redis.call('XCLAIM', key, GROUP, CONSUMER, 0, id, 'JUSTID')
        take(stream, id, deliveries, entry[2], cost(entry[2]))
        took_suspect = alone
        full = full or alone
      end
    end
  end
end

local function find_group(key)
  local infos = redis.pcall('XINFO', 'GROUPS', key)
  if infos.err and not string.find(string.lower(tostring(infos.err)), 'no such key', 1, true) then return nil, infos end
  for _, info in ipairs(infos) do
    local group = {}
    for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
    if group['name'] == GROUP then return group end
  end
end

local groups, last, waiting, share = {}, {}, {}, 0

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

-- At most `saved` rows where given; else what fits.
local function take_new(stream, saved)
  local ids, left = {}, saved or 0
  local most = math.min(share, MAX_JOBS - #taken)
  if most < 1 or waiting[stream] < 1 then return end

  local function take_each(entries)
    for _, entry in ipairs(entries) do
      local r, t = cost(entry[2])
      if full or saved and left < r then return false end
      if not fits(r, t) then
        full, blocked = true, stream
        return false
      end
      take(stream, entry[1], 1, entry[2], r, t, saved)
      ids[#ids + 1], left = entry[1], left - r
    end
    return true
  end

  -- XREADGROUP knows no rows or tokens: look first, then deliver exactly what fits. In pages that grow: where a job has
  -- many rows few fit, and to copy a body costs more than to look again.
  local size, after = FIRST_PAGE, last[stream]
  while #ids < most and not full do
    local count = math.min(size, most - #ids)
    local entries = redis.call('XRANGE', KEYS[stream], '(' .. after, '+', 'COUNT', count)
    if not take_each(entries) or #entries < count then break end
    size, after = 2 * size, entries[#entries][1]
  end
  if #ids > 0 then deliver(stream, ids) end
  share, waiting[stream] = share - #ids, waiting[stream] - #ids
end

for stream = 1, 3 do
  local group, refused = find_group(KEYS[stream])
  if refused then return refused end
  if not group then return redis.error_reply('NOGROUP no group ' .. GROUP .. ' on ' .. KEYS[stream]) end
  groups[stream], last[stream] = group, group['last-delivered-id']
  waiting[stream] = math.max(0, redis.call('XLEN', KEYS[stream]) - group['pending'])
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[4]) == 1 then return {now, waiting, 0, 1, 0} end

-- One worker must not hoard what its idle neighbours could run at once.
share = math.max(1, math.ceil((waiting[1] + waiting[2] + waiting[3]) / LIVE))
for stream = 1, LAST_RETURNED do take_returned(stream) end
for stream = LAST_STREAM, 2, -1 do
  if not full then take_new(stream, SAVED_ROWS[stream]) end
end
for stream = 1, LAST_STREAM do
  if not full then take_new(stream) end
end

return {now, waiting, suspects, 0, blocked, unpack(taken)}
