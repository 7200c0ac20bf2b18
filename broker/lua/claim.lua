-- Take jobs for one worker: what others gave back first, then new ones, most urgent stream first, within a budget.
-- KEYS[1..3] STREAM realtime, normal, batch
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] consumer of returned jobs
-- ARGV[4] jobs, ARGV[5] rows, ARGV[6] tokens at most   ARGV[7] live workers
-- ARGV[8] 1: this worker holds nothing, so an over-large or a suspect job may go to it, alone
-- Returns {now_ms, waiting, suspects, {stream, entry id, deliveries, fields}, ...}
--   waiting: new jobs left in the streams; suspects: returned jobs left that wait for a worker that holds nothing
-- Raises NOGROUP only. What an entry holds is never trusted: without usable numbers it counts as one row.

local GROUP, CONSUMER, RETURNED = ARGV[1], ARGV[2], ARGV[3]
local MAX_JOBS, MAX_ROWS, MAX_TOKENS = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LIVE, EMPTY_HANDED = tonumber(ARGV[7]), ARGV[8] == '1'
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

local function take(stream, id, deliveries, fields, r, t)
  taken[#taken + 1] = {stream, id, deliveries, fields}
  rows, tokens = rows + r, tokens + t
  full = #taken >= MAX_JOBS or rows >= MAX_ROWS or tokens >= MAX_TOKENS
end

local suspects = 0

local function take_returned(stream)
  local key = KEYS[stream]
  for _, pending in ipairs(redis.call('XPENDING', key, GROUP, '-', '+', MAX_JOBS + 64, RETURNED)) do
    local id, deliveries = pending[1], pending[4]
    local alone = deliveries >= SUSPECT
    if alone and (#taken > 0 or not EMPTY_HANDED) then
      suspects = suspects + 1
    elseif not full then
      local entry = redis.call('XRANGE', key, id, id)[1]
      if not entry then
        redis.call('XACK', key, GROUP, id)
      else
        local r, t = cost(entry[2])
        if fits(r, t) then
          redis.call('XCLAIM', key, GROUP, CONSUMER, 0, id, 'JUSTID')
          take(stream, id, deliveries, entry[2], r, t)
          full = full or alone
        else
          -- Not overtaken: small jobs that keep coming would pass it for ever.
          full = true
          if #taken == 0 then suspects = suspects + 1 end
        end
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

local function take_new(stream, last, share)
  local key, count, first = KEYS[stream], 0, #taken
  -- COUNT of XREADGROUP knows no rows or tokens: look first, then read exactly what fits.
  for _, entry in ipairs(redis.call('XRANGE', key, '(' .. last, '+', 'COUNT', math.min(share, MAX_JOBS - first))) do
    local r, t = cost(entry[2])
    if full or not fits(r, t) then full = true break end
    take(stream, entry[1], 1, entry[2], r, t)
    count = count + 1
  end
  if count > 0 then
    redis.call('XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', count, 'STREAMS', key, '>')
  end
  return count
end

local last, waiting = {}, 0
for stream = 1, 3 do
  local pending
  if redis.call('EXISTS', KEYS[stream]) == 1 then last[stream], pending = last_delivered(KEYS[stream]) end
  if not last[stream] then return redis.error_reply('NOGROUP no group ' .. GROUP .. ' on ' .. KEYS[stream]) end
  waiting = waiting + math.max(0, redis.call('XLEN', KEYS[stream]) - pending)
end
for stream = 1, 3 do take_returned(stream) end
-- One worker must not hoard what its idle neighbours could run at once.
local share = math.max(1, math.ceil(waiting / LIVE))
for stream = 1, 3 do
  if not full and share > 0 then
    local count = take_new(stream, last[stream], share)
    share, waiting = share - count, waiting - count
  end
end

local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), waiting, suspects, unpack(taken)}
