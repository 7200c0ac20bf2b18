-- Cancels jobs: deletes a job that waits, and marks one that a worker holds for that worker.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] ZSET cancelled   KEYS[5] HASH trail
-- KEYS[6] HASH metrics: 'settled' (jobs), 'failed:cancelled' (rows)
-- KEYS[7] STREAM webhooks
-- KEYS[8..] per job: STRING seen, HASH or STRING of its result, STRING partial
-- ARGV[1] group  ARGV[2] consumer of returned jobs  ARGV[3] lifetime of a mark, ms
-- then per job: job id, 'hash' | 'string' | 'none' (a client waits for no reply to a cancelled job), result ttl ms,
--   result
-- Returns per job: 2 it waited and is deleted; 1 its worker reads the mark at its next heartbeat; 0 it is settled, or
--   never existed

local GROUP, RETURNED, MARKS_KEPT_MS = ARGV[1], ARGV[2], tonumber(ARGV[3])
local SEEN_AFTER_SETTLE_MS = 20000
-- Number of fields of a detached call's hash that are not jobs, without `failed`; time for its caller to submit the
-- rest of the call.
local CALL_FIELDS, SUBMITTING_MS = 4, 3600000
local MAX_PAYLOAD, MOST_WEBHOOKS, WEBHOOKS_KEPT_MS = 4096, 10000, 2 * 86400000
local METRICS_KEPT_MS = 30 * 86400000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Returns the stream, the entry id and the rows of an accepted job; nothing if it is settled. Older clients did not
-- store the stream, and two streams may have the same entry id within one ms, so the job id in the entry decides.
local function find(accepted, job)
  local named, entry = string.match(accepted, '^([123]):(.+)$')
  for stream = tonumber(named or 1), tonumber(named or 3) do
    local found = redis.call('XRANGE', KEYS[stream], entry or accepted, entry or accepted)[1]
    if found and found[2][3] == 'id' and found[2][4] == job then
      return stream, entry or accepted, found[2][9] == 'rows' and tonumber(found[2][10]) or 1
    end
  end
end

local function holder(stream, entry)
  local pending = redis.call('XPENDING', KEYS[stream], GROUP, entry, entry, 1)[1]
  return pending and pending[2]
end

-- As in settle: announces a call whose jobs are all answered, if its payload has a webhook.
local function announce(key, payload, failures)
  if #payload > MAX_PAYLOAD or not string.match(payload, '^%d+x%d+ %x* %S+$') then return end
  redis.pcall('XADD', KEYS[7], 'MAXLEN', '~', MOST_WEBHOOKS, '*',
    'call', string.match(key, '[^:]*$'), 'payload', payload, 'failed', failures)
  redis.pcall('PEXPIRE', KEYS[7], WEBHOOKS_KEPT_MS)
end

-- As in settle: writes a result of a detached call to its hash, see enqueue. All results of a call expire together, a
-- ttl after the last one. A result that exists is not replaced.
local function keep(key, job, ttl, reply, failed)
  local length = redis.pcall('HSTRLEN', key, job)
  if length ~= 0 then return false end
  local new = redis.call('HSET', key, job, reply)
  if failed > 0 then redis.call('HINCRBY', key, 'failed', failed) end
  if redis.call('HINCRBY', key, 'left', new - 1) > 0 then return true end
  local found = redis.call('HMGET', key, 'jobs', 'ttl', 'payload', 'failed')
  local jobs, own_ttl, payload, failures = unpack(found, 1, 4)
  ttl = tonumber(own_ttl) or tonumber(ttl)
  if jobs and redis.call('HLEN', key) < CALL_FIELDS + (failures and 1 or 0) + jobs then
    ttl = math.max(ttl, SUBMITTING_MS)
  elseif payload then
    announce(key, payload, failures or '0')
  end
  redis.call('PEXPIRE', key, string.format('%.0f', ttl))
  return true
end

local function answer(kind, key, job, ttl, result, rows)
  if kind == 'hash' then
    keep(key, job, ttl, result, rows)
  elseif kind == 'string' then
    redis.pcall('SET', key, result, 'PX', ttl)
  end
end

-- Adds to a counter. pcall: counting must not fail a job. A result of `n` says that the field is new, perhaps with its
-- key, which heartbeats then renew.
local function count(field, n)
  if n > 0 and redis.pcall('HINCRBY', KEYS[6], field, n) == n then redis.pcall('PEXPIRE', KEYS[6], METRICS_KEPT_MS) end
end
local jobs_deleted, rows_deleted = 0, 0
-- Set by fair_delete.lua: unindex(stream, entry id), before the entry is deleted.
local unindex -- luacheck: ignore 221

local function cancel(seen, key, partial, job, kind, ttl, result)
  local accepted = redis.call('GET', seen)
  if not accepted then return 0 end
  local stream, entry, rows = find(accepted, job)
  if not stream then return 0 end
  local owner = holder(stream, entry)
  if owner and owner ~= RETURNED then
    redis.call('ZADD', KEYS[4], now, stream .. ':' .. entry)
    redis.call('PEXPIRE', KEYS[4], MARKS_KEPT_MS)
    return 1
  end
  if owner then
    -- pcall: clients lack the permission for XACK, with which they could settle other jobs. claim then does both.
    redis.pcall('XACK', KEYS[stream], GROUP, entry)
    redis.pcall('HDEL', KEYS[5], stream .. ':' .. entry, stream .. ':' .. entry .. ':batch')
  end
  if unindex then unindex(stream, entry) end
  redis.call('XDEL', KEYS[stream], entry)
  jobs_deleted, rows_deleted = jobs_deleted + 1, rows_deleted + rows
  redis.call('DEL', partial)
  answer(kind, key, job, ttl, result, rows)
  -- As in settle: a detached job stays known as long as its result; the hash of its call does this for newer clients.
  redis.call('PEXPIRE', seen, kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
  return 2
end

-- fair parts

-- Removes old marks, and those far ahead of the clock, which stepped back since.
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - MARKS_KEPT_MS)
redis.call('ZREMRANGEBYSCORE', KEYS[4], now + MARKS_KEPT_MS, '+inf')
local outcomes, key = {}, 8
for arg = 4, #ARGV, 4 do
  outcomes[#outcomes + 1] = cancel(KEYS[key], KEYS[key + 1], KEYS[key + 2],
    ARGV[arg], ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3])
  key = key + 3
end
count('settled', jobs_deleted)
count('failed:cancelled', rows_deleted)
return outcomes
