-- Append to running jobs what they generated since the last call, and show it to their clients: only for the holder of
-- a job, each byte once, however often the same call is sent.
-- KEYS[1..3] STREAM realtime, normal, batch
-- KEYS[4..] per job: STRING partial, STRING seen, STREAM replies of its client (any key of the service if it has none)
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] unread entries from which on a reply stream gets no deltas
-- ARGV[4] reply ttl ms
-- then per job: stream 1..3 ':' entry id, job id, 'stream' | 'none', bytes that partial had before, records,
--   delta ('' for no new text), 1 if it progressed so far that an earlier death is forgiven
-- Returns per job: bytes of partial now; if they are not those before and the records, nothing was changed, and the
--   caller goes on from there; -1 another worker holds the job, or it is settled; -2 partial holds other records
-- A delta may repeat text that the client has: its offset says so. A client that reads slowly gets no deltas, and the
-- whole text with the reply.

local GROUP, CONSUMER, MOST_UNREAD, REPLY_TTL = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local LOST, DIVERGED = -1, -2
-- The life of a partial whose job has no seen key: a client of an older version enqueued it.
local LIFE_MS = 86400000

local function holds(stream, entry)
  return redis.call('XPENDING', stream, GROUP, entry, entry, 1, CONSUMER)[1] ~= nil
end

-- Forgives deaths: 0 deliveries and one attempt are less than a suspect has. See lease.py for how deliveries count.
local function forgive(stream, entry)
  redis.call('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'RETRYCOUNT', 0, 'JUSTID')
end

-- The part of `records` that is missing behind `length` bytes, `expected` of which the caller knows; nil if the bytes
-- behind those are not the beginning of `records`.
local function missing(partial, length, expected, records)
  if length == expected then return records end
  local written = redis.call('GETRANGE', partial, expected, -1)
  if string.sub(records, 1, #written) == written then return string.sub(records, #written + 1) end
end

local function show(kind, replies, job, delta)
  if kind ~= 'stream' or delta == '' then return end
  -- pcall: whatever else may lie under its key.
  local unread = redis.pcall('XLEN', replies)
  if type(unread) ~= 'number' or unread >= MOST_UNREAD then return end
  redis.pcall('XADD', replies, '*', 'id', job, 'delta', delta)
  redis.pcall('PEXPIRE', replies, REPLY_TTL)
end

local function emit(key, arg)
  local partial, seen, replies = KEYS[key], KEYS[key + 1], KEYS[key + 2]
  local stream, entry = KEYS[tonumber(string.sub(ARGV[arg], 1, 1))], string.sub(ARGV[arg], 3)
  local job, kind, expected = ARGV[arg + 1], ARGV[arg + 2], tonumber(ARGV[arg + 3])
  local records, delta = ARGV[arg + 4], ARGV[arg + 5]
  if not holds(stream, entry) then return LOST end
  local length = redis.call('STRLEN', partial)
  if length < expected then return length end
  local rest = missing(partial, length, expected, records)
  if not rest then return DIVERGED end
  if rest ~= '' then
    local now = redis.call('APPEND', partial, rest)
    if length == 0 then
      local life = redis.call('PTTL', seen)
      redis.call('PEXPIRE', partial, string.format('%.0f', life > 0 and life or LIFE_MS))
    end
    length = now
    show(kind, replies, job, delta)
  end
  if ARGV[arg + 6] == '1' then forgive(stream, entry) end
  return length
end

local outcomes, key = {}, 4
for arg = 5, #ARGV, 7 do
  outcomes[#outcomes + 1] = emit(key, arg)
  key = key + 3
end
return outcomes
