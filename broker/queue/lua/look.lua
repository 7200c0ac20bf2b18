-- Tells what waits in the streams of a service that no lane of the caller claims from. Changes nothing.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STRING paused
-- ARGV[1] group  ARGV[2] consumer of returned jobs
-- Returns {now_ms, 1 if the service is paused, and for each stream: jobs that no worker holds, the time at which the
--   oldest of them was accepted and its deadline, both ms as in its entry, 0 if there is none}

local GROUP, RETURNED = ARGV[1], ARGV[2]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- The field of an entry as a number of at most 16 digits; 0 if it is missing or malformed.
local function number(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name and #fields[i + 1] <= 16 and string.match(fields[i + 1], '^%d+$') then
      return tonumber(fields[i + 1])
    end
  end
  return 0
end

-- The id of the last entry that was delivered; nil if the group does not exist.
local function delivered(key)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local name, last
    for i = 1, #group, 2 do
      if group[i] == 'name' then name = group[i + 1] end
      if group[i] == 'last-delivered-id' then last = group[i + 1] end
    end
    if name == GROUP then return last end
  end
end

-- The oldest entry that was given back, or else the oldest one that was never delivered.
local function head(key, last)
  local returned = last and redis.call('XPENDING', key, GROUP, '-', '+', 1, RETURNED)[1]
  if returned then
    local found = redis.call('XRANGE', key, returned[1], returned[1])[1]
    if found then return found end
  end
  return redis.call('XRANGE', key, last and '(' .. last or '-', '+', 'COUNT', 1)[1]
end

local found = {now, redis.call('EXISTS', KEYS[4])}
for stream = 1, 3 do
  local key = KEYS[stream]
  local waiting, at, deadline = 0, 0, 0
  if redis.call('EXISTS', key) == 1 then
    local last, held = delivered(key), 0
    for _, consumer in ipairs(last and redis.call('XPENDING', key, GROUP)[4] or {}) do
      if consumer[1] ~= RETURNED then held = held + consumer[2] end
    end
    waiting = math.max(0, redis.call('XLEN', key) - held)
    local entry = waiting > 0 and head(key, last)
    if entry then at, deadline = number(entry[2], 'at'), number(entry[2], 'deadline') end
  end
  for _, each in ipairs({waiting, at, deadline}) do found[#found + 1] = each end
end
return found
