-- Accepts jobs in groups: a group is accepted as a whole or refused, and only once, however often its caller sends it.
-- In order: if a group of one job is refused, later groups of its priority, or of its rate limit, are refused, too.
-- KEYS[1] HASH the service   KEYS[2..4] STREAM realtime, normal, batch   KEYS[5] HASH the service's token bucket
-- KEYS[6] STRING paused: 'refusing' refuses new jobs   KEYS[7] HASH refused: reason -> number of calls
-- KEYS[8] HASH metrics: 'jobs:PRIORITY', 'further_rows:PRIORITY' (beyond one a job), 'refused:REASON' (calls)
-- KEYS[9..] per group: HASH its tenant's token bucket; HASH its detached call, if it has one; per job: STRING seen
-- ARGV[1] number of groups; then per group: priority 1..3, jobs, calls to charge (-1: it costs nothing), calls to
--         count if refused, id of the detached call ('' for none); for a detached call: jobs of the whole call, its
--         payload, result ttl ms ('' for the worker's); then per job: id op rows tokens deadline_in queue_in client
--         tenant trace body (times in ms from now, '' for none). An entry omits fields that are ''.
-- The hash of a detached call has the fields payload (its shape, digest and, if it has one, webhook, after a space
--   each), jobs, left (accepted and not answered), ttl, failed (rows with an error, if there are any), and one per
--   job: '' until it is answered, then its reply. The whole hash expires at once, see settle. Jobs of the call that
--   were accepted before are skipped; the others of the group are accepted or refused together.
-- Returns per group {1} accepted; {2} accepted before; {0, reason, retry_after_ms, limit} refused
--   limit: most jobs of its priority if the reason is queue_full, most waiting jobs of a tenant in it if it is
--     tenant_full, otherwise 0
-- Reasons: unknown_service, paused, queue_full, tenant_full, rate_limited,
--   over_burst (it costs more than a full token bucket), reused_key (the call has another payload)
-- Raises FAIR if the service has `fair` and this is not enqueue_fair, which scripts.py makes of this file and of
--   fair.lua and fair_enqueue.lua.

local ACCEPTED, ACCEPTED_BEFORE, REFUSED = 1, 2, 0
local SEEN_AFTER_DEADLINE_MS = 60000
-- A job may wait as long as its service is paused. The scripts that end a job shorten the ttl of its key `seen`.
local SEEN_WITHOUT_DEADLINE_MS = 366 * 86400000
local SEEN_AFTER_REPEAT_MS = 20000
local REFUSED_KEPT_MS, METRICS_KEPT_MS = 86400000, 30 * 86400000
local RETRY_AFTER_MS, RETRY_PAUSED_AFTER_MS = 100, 500
local STREAM = {'1:', '2:', '3:'}
local PRIORITIES = {'realtime', 'normal', 'batch'}

-- The server's clock: callers' clocks differ, which would falsify deadlines and rates.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local now_text = string.format('%.0f', now)
local seconds = time[1] + time[2] / 1000000

local spec = redis.call('HMGET', KEYS[1], 'version', 'max_queue_size',
  'rate_requests', 'rate_rows', 'rate_tokens', 'rate_burst_s', 'rate_per',
  'max_queue_realtime', 'max_queue_normal', 'max_queue_batch', 'fair', 'max_queue_tenant', 'rate_beyond')
local known, burst_s, per_tenant = spec[1], tonumber(spec[6]) or 1, spec[7] == 'tenant'
local rates = {requests = tonumber(spec[3]), rows = tonumber(spec[4]), tokens = tonumber(spec[5])}
local limited = next(rates) ~= nil
-- Class that takes what is beyond the rate limit, 1..3; nil: it is refused.
local overflow = tonumber(spec[13])
-- Most jobs in each stream. A record that an older version wrote has '' for a priority without a limit of its own.
local common = tonumber(spec[2])
local depth_limits = {tonumber(spec[8]) or common, tonumber(spec[9]) or common, tonumber(spec[10]) or common}
-- Jobs in each stream, by priority; nil until a group asks.
local depths = {}
local refusing = redis.call('GET', KEYS[6]) == 'refusing'
-- What this call accepts, by priority, and refuses, by reason: added to the counters at once in the end.
local added_jobs, further_rows, refusals = {0, 0, 0}, {0, 0, 0}, {}

-- Cached texts of times: many jobs of one call of this script have the same remaining time.
local moments, lives = {[''] = ''}, {[''] = string.format('%.0f', SEEN_WITHOUT_DEADLINE_MS)}

local function from_now(remaining)
  local moment = moments[remaining]
  if not moment then
    moment = string.format('%.0f', now + remaining)
    moments[remaining], lives[remaining] = moment, string.format('%.0f', remaining + SEEN_AFTER_DEADLINE_MS)
  end
  return moment
end

local function add(words, name, value)
  if value ~= '' then words[#words + 1], words[#words + 2] = name, value end
end

-- Set by fair_enqueue.lua. index_job(priority, tenant, entry id): notes an accepted job.
-- tenant_limit(priority, arg, jobs): returns the limit on the waiting jobs of a tenant if a group exceeds it.
local index_job, tenant_limit -- luacheck: ignore 221

local function accept(priority, seen, at, call)
  local remaining = ARGV[at + 4]
  local words = {'v', '1', 'id', ARGV[at], 'at', now_text, 'op', ARGV[at + 1],
    'rows', ARGV[at + 2], 'tokens', ARGV[at + 3]}
  add(words, 'deadline', from_now(remaining))
  add(words, 'queue_by', from_now(ARGV[at + 5]))
  add(words, 'client', ARGV[at + 6])
  add(words, 'tenant', ARGV[at + 7])
  add(words, 'trace', ARGV[at + 8])
  add(words, 'call', call)
  words[#words + 1], words[#words + 2] = 'body', ARGV[at + 9]
  local entry = redis.call('XADD', KEYS[1 + priority], '*', unpack(words))
  -- With the stream: within one ms another stream may have an entry with this id.
  redis.call('SET', seen, STREAM[priority] .. entry, 'PX', lives[call == '' and remaining or ''])
  if index_job then index_job(priority, ARGV[at + 7], entry) end
  added_jobs[priority] = added_jobs[priority] + 1
  if ARGV[at + 2] ~= '1' then further_rows[priority] = further_rows[priority] + ARGV[at + 2] - 1 end
end

-- Keeps a job known while its caller repeats it, also after it is settled. It is also a write: WAIT covers the last
-- write of its connection, which for a repeated job must not be one before the job was accepted.
local function note_repeat(seen)
  local ttl = redis.call('PTTL', seen)
  if ttl >= 0 then redis.call('PEXPIRE', seen, string.format('%.0f', math.max(ttl, SEEN_AFTER_REPEAT_MS))) end
end

-- A group without a detached call is accepted as a whole: if one job is known, all were accepted, and the others were
-- settled since.
local function is_known(seen, jobs)
  if jobs == 1 then return redis.call('EXISTS', KEYS[seen]) == 1 end
  return redis.call('EXISTS', unpack(KEYS, seen, seen + jobs - 1)) > 0
end

-- Returns the jobs of a detached call's group that were not accepted before, as numbers from 0.
local function new_jobs(record, arg, jobs)
  local found = {}
  for job = 0, jobs - 1 do
    if redis.call('HEXISTS', record.key, ARGV[arg + 10 * job]) == 0 then found[#found + 1] = job end
  end
  return found
end

local function note(record, arg, accepted)
  local fields = {'payload', record.payload, 'jobs', record.jobs, 'ttl', record.ttl}
  for _, job in ipairs(accepted) do
    fields[#fields + 1], fields[#fields + 2] = ARGV[arg + 10 * job], ''
  end
  redis.call('HSET', record.key, unpack(fields))
  redis.call('HINCRBY', record.key, 'left', #accepted)
  redis.call('PEXPIRE', record.key, lives[''])
end

-- Extends the life of results whose call is repeated. It is a write, as note_repeat is.
local function renew(record)
  local ttl = math.max(redis.call('PTTL', record.key), tonumber(record.ttl) or SEEN_AFTER_REPEAT_MS)
  redis.call('PEXPIRE', record.key, string.format('%.0f', ttl))
end

local function is_reused(record)
  local payload = redis.call('HGET', record.key, 'payload')
  return payload and payload ~= record.payload
end

-- Returns the levels of a token bucket for each rate: at most `burst_s` seconds of the rate, refilled with time.
local function levels_of(bucket)
  local stored = redis.call('HMGET', bucket, 'at', 'requests', 'rows', 'tokens')
  local passed = seconds - (tonumber(stored[1]) or seconds)
  if passed < 0 then
    -- The clock stepped back: nothing is refilled, and the refill continues from now.
    redis.call('HSET', bucket, 'at', string.format('%.6f', seconds))
    passed = 0
  end
  local before = {requests = tonumber(stored[2]), rows = tonumber(stored[3]), tokens = tonumber(stored[4])}
  local levels = {}
  for name, rate in pairs(rates) do
    levels[name] = math.min(rate * burst_s, (before[name] or rate * burst_s) + passed * rate)
  end
  return levels
end

-- Takes `cost` from the bucket and returns nothing; or returns a reason and ms to wait, and takes nothing.
local function charge(bucket, cost)
  local levels, wait_s = levels_of(bucket), 0
  for name, rate in pairs(rates) do
    if cost[name] > rate * burst_s then return 'over_burst', 0 end
    wait_s = math.max(wait_s, (cost[name] - levels[name]) / rate)
  end
  if wait_s > 0 then return 'rate_limited', math.ceil(wait_s * 1000) end
  redis.call('HSET', bucket, 'at', string.format('%.6f', seconds))
  for name in pairs(rates) do
    redis.call('HSET', bucket, name, string.format('%.6f', levels[name] - cost[name]))
  end
  redis.call('PEXPIRE', bucket, math.ceil(burst_s * 1000) + 1000)
end

local function cost_of(arg, calls, jobs)
  local cost = {requests = calls, rows = 0, tokens = 0}
  for job = 0, jobs - 1 do
    cost.rows = cost.rows + ARGV[arg + 10 * job + 2]
    cost.tokens = cost.tokens + ARGV[arg + 10 * job + 3]
  end
  return cost
end

local function is_full(priority, jobs)
  depths[priority] = depths[priority] or redis.call('XLEN', KEYS[1 + priority])
  return depth_limits[priority] and depths[priority] + jobs > depth_limits[priority]
end

local function lack_of_room(priority, arg, jobs)
  if is_full(priority, jobs) then return 'queue_full', RETRY_AFTER_MS, depth_limits[priority] end
  local limit = tenant_limit and tenant_limit(priority, arg, jobs)
  if limit then return 'tenant_full', RETRY_AFTER_MS, limit end
end

local function refusal(priority, bucket, arg, calls, jobs)
  if not known then return 'unknown_service', 0 end
  if refusing then return 'paused', RETRY_PAUSED_AFTER_MS end
  local reason, retry_after, limit = lack_of_room(priority, arg, jobs)
  if reason then return reason, retry_after, limit end
  if limited and calls >= 0 then return charge(bucket, cost_of(arg, calls, jobs)) end
end

-- pcall: if the server's memory is full, the groups are still refused, without the count.
local function count_refusals(reason, calls)
  if reason == 'unknown_service' or calls == '0' then return end
  redis.pcall('HINCRBY', KEYS[7], reason, calls)
  redis.pcall('PEXPIRE', KEYS[7], REFUSED_KEPT_MS)
  refusals[reason] = (refusals[reason] or 0) + calls
end

-- The first refusal of each priority that is full, and of each priority and token bucket, or tenant, that is.
local closed

local function decide(priority, bucket, arg, calls, jobs)
  if closed then
    local earlier = closed[priority] or closed[priority .. bucket] or closed[priority .. '\0' .. ARGV[arg + 7]]
    if earlier then return unpack(earlier) end
  end
  local reason, retry_after, limit = refusal(priority, bucket, arg, calls, jobs)
  -- Only single jobs: a larger group needs more room than jobs behind it, and must not block them.
  if reason and jobs == 1 then
    closed = closed or {}
    local refused = {reason, retry_after, limit}
    if reason == 'queue_full' then closed[priority] = refused end
    if reason == 'tenant_full' then closed[priority .. '\0' .. ARGV[arg + 7]] = refused end
    if reason == 'rate_limited' then closed[priority .. bucket] = refused end
  end
  return reason, retry_after, limit
end

-- Returns the refusal of a group; or nil if its `jobs` new jobs are accepted, and their priority.
local function refuse(priority, bucket, arg, calls, jobs, to_count)
  local reason, retry_after, limit = decide(priority, bucket, arg, calls, jobs)
  if overflow and (reason == 'rate_limited' or reason == 'over_burst') then
    priority = math.max(priority, overflow)
    reason, retry_after, limit = lack_of_room(priority, arg, jobs)
  end
  if reason then
    count_refusals(reason, to_count)
    return {REFUSED, reason, retry_after, limit or 0}
  end
  depths[priority] = depths[priority] + jobs
  return nil, priority
end

local function enter(priority, bucket, arg, seen, jobs, calls, to_count)
  if is_known(seen, jobs) then
    for job = 0, jobs - 1 do note_repeat(KEYS[seen + job]) end
    return {ACCEPTED_BEFORE}
  end
  local refused, class = refuse(priority, bucket, arg, calls, jobs, to_count)
  if refused then return refused end
  for job = 0, jobs - 1 do accept(class, KEYS[seen + job], arg + 10 * job, '') end
  return {ACCEPTED}
end

local function enter_detached(priority, bucket, arg, seen, jobs, calls, to_count, record)
  if is_reused(record) then return {REFUSED, 'reused_key', 0, 0} end
  local new = new_jobs(record, arg, jobs)
  if #new == 0 then
    renew(record)
    return {ACCEPTED_BEFORE}
  end
  local refused, class = refuse(priority, bucket, arg, calls, #new, to_count)
  if refused then return refused end
  for _, job in ipairs(new) do accept(class, KEYS[seen + job], arg + 10 * job, record.call) end
  note(record, arg, new)
  return {ACCEPTED}
end

-- Adds to a counter. pcall: counting must not fail a job. A result of `n` says that the field is new, perhaps with its
-- key, which heartbeats then renew.
local function count(field, n)
  if n > 0 and redis.pcall('HINCRBY', KEYS[8], field, n) == n then redis.pcall('PEXPIRE', KEYS[8], METRICS_KEPT_MS) end
end

-- fair parts

if spec[11] == 'tenant' and not index_job then return redis.error_reply('FAIR the service needs enqueue_fair') end
local outcomes = {}
local arg, key = 2, 9
for group = 1, tonumber(ARGV[1]) do
  local priority, jobs, calls = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2])
  local to_count, call = ARGV[arg + 3], ARGV[arg + 4]
  local bucket = per_tenant and KEYS[key] or KEYS[5]
  arg, key = arg + 5, key + 1
  if call == '' then
    outcomes[group] = enter(priority, bucket, arg, key, jobs, calls, to_count)
  else
    local record = {call = call, key = KEYS[key], jobs = ARGV[arg], payload = ARGV[arg + 1], ttl = ARGV[arg + 2]}
    arg, key = arg + 3, key + 1
    outcomes[group] = enter_detached(priority, bucket, arg, key, jobs, calls, to_count, record)
  end
  arg, key = arg + 10 * jobs, key + jobs
end
for priority, jobs in ipairs(added_jobs) do
  if jobs > 0 then
    count('jobs:' .. PRIORITIES[priority], jobs)
    count('further_rows:' .. PRIORITIES[priority], further_rows[priority])
  end
end
for reason, calls in pairs(refusals) do count('refused:' .. reason, calls) end
return outcomes
