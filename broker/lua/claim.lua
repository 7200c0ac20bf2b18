-- Take jobs for one worker: all that others gave back first, then new ones, most urgent stream first, within a budget.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STRING paused: while it exists nothing is taken
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4] jobs, ARGV[5] rows, ARGV[6] tokens at most   ARGV[7] live workers
-- ARGV[8] 1: this worker holds nothing, so an over-large or a suspect job may go to it, alone
-- ARGV[9] the last stream to take from: 1 for realtime only, 3 for all
-- ARGV[10], ARGV[11] rows that normal and batch may take before their betters: their share, saved up
-- Returns {now_ms, {waiting in each stream}, suspects, 1 if paused,
--   {stream, entry id, deliveries, fields, 1 if by share}, ...}
--   waiting: new jobs left in the streams; suspects: returned jobs left that wait for a worker that holds nothing
-- Raises NOGROUP only. What an entry holds is never trusted: without usable numbers it counts as one row.

local GROUP, CONSUMER, RETURNED = ARGV[1], ARGV[2], ARGV[3]
local MAX_JOBS, MAX_ROWS, MAX_TOKENS = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LIVE, EMPTY_HANDED, LAST_STREAM = tonumber(ARGV[7]), ARGV[8] == '1', tonumber(ARGV[9])
local SAVED_ROWS = {0, tonumber(ARGV[10]), tonumber(ARGV[11])}
-- Deliveries count 1 + 2 x attempts + hosts lost; from one attempt on a job runs alone (see lease.py).
local SUSPECT = 3

local taken = {}
local rows, tokens, full = 0, 0, false

local function cost(fields)
  local r, t = 1, 0
  for i = 1, math.min(#fields, 24) - 1, 2 do
    if fields[i] == 'rows' then r = tonumber(fields[i + 1]) or 1 end
    if fields[i] == 'tokens' then t = tonumber(fields[i + 1]) or 0 end
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

local function last_delivered(key)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local group = {}
    for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
    if group['name'] == GROUP then return group['last-delivered-id'], group['pending'] end
  end
end

local last, waiting, share = {}, {}, 0

-- At most `saved` rows where given; else what fits.
local function take_new(stream, saved)
  local key, count, left = KEYS[stream], 0, saved or 0
  local most = math.min(share, MAX_JOBS - #taken)
  if most < 1 or waiting[stream] < 1 then return end
  -- COUNT of XREADGROUP knows no rows or tokens: look first, then read exactly what fits.
  for _, entry in ipairs(redis.call('XRANGE', key, '(' .. last[stream], '+', 'COUNT', most)) do
    local r, t = cost(entry[2])
    if saved and left < r then break end
    if full or not fits(r, t) then full = true break end
    take(stream, entry[1], 1, entry[2], r, t, saved)
    count, left, last[stream] = count + 1, left - r, entry[1]
  end
  if count > 0 then
    redis.call('XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', count, 'STREAMS', key, '>')
  end
  share, waiting[stream] = share - count, waiting[stream] - count
end

for stream = 1, 3 do
  local pending
  if redis.call('EXISTS', KEYS[stream]) == 1 then last[stream], pending = last_delivered(KEYS[stream]) end
  if not last[stream] then return redis.error_reply('NOGROUP no group ' .. GROUP .. ' on ' .. KEYS[stream]) end
  waiting[stream] = math.max(0, redis.call('XLEN', KEYS[stream]) - pending)
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[4]) == 1 then return {now, waiting, 0, 1} end

-- One worker must not hoard what its idle neighbours could run at once.
share = math.max(1, math.ceil((waiting[1] + waiting[2] + waiting[3]) / LIVE))
for stream = 1, LAST_STREAM do take_returned(stream) end
for stream = LAST_STREAM, 2, -1 do
  if not full then take_new(stream, SAVED_ROWS[stream]) end
end
for stream = 1, LAST_STREAM do
  if not full then take_new(stream) end
end

return {now, waiting, suspects, 0, unpack(taken)}
