-- Answer jobs and retire their entries, each once: the first caller wins, a late twin changes nothing.
-- KEYS[1..3] STREAM realtime, normal, batch   KEYS[4] STREAM dead letters
-- KEYS[5..] per job: STREAM or STRING where the reply goes, STRING seen
-- ARGV[1] group  ARGV[2] dead letters kept; then per job:
--   stream 1..3, entry id, job id, 'stream' | 'string' | 'none', reply ttl ms, reply, reason to bury it ('' for none)
-- Returns per job: 1 answered; 0 settled before; -1 the reply could not be written, a dead letter holds the job

local GROUP, DEAD_KEPT = ARGV[1], ARGV[2]
local SEEN_AFTER_SETTLE_MS = 20000
local MAX_FIELDS = 64

local function bury(stream, id, reason)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  local copy = {'reason', reason, 'entry', id}
  if entry then
    for i = 1, math.min(#entry[2], MAX_FIELDS) do copy[#copy + 1] = entry[2][i] end
  end
  -- pcall: whatever became of the dead letters, the jobs after this one are to be settled.
  redis.pcall('XADD', KEYS[4], 'MAXLEN', '~', DEAD_KEPT, '*', unpack(copy))
end

local expiring = {}

local function answer(kind, key, job, ttl, reply)
  if kind == 'none' then return true end
  if kind == 'string' then
    return not redis.pcall('SET', key, reply, 'PX', ttl).err
  end
  local written = redis.pcall('XADD', key, '*', 'id', job, 'reply', reply)
  if type(written) == 'table' and written.err then return false end
  expiring[key] = ttl
  return true
end

local outcomes = {}
local arg, key = 3, 5
while arg <= #ARGV do
  local stream, id, job = KEYS[tonumber(ARGV[arg])], ARGV[arg + 1], ARGV[arg + 2]
  local kind, ttl, reply, reason = ARGV[arg + 3], ARGV[arg + 4], ARGV[arg + 5], ARGV[arg + 6]
  -- XACK first: it is allowed at maxmemory, and what follows it in the script then is too.
  if redis.call('XACK', stream, GROUP, id) == 0 then
    outcomes[#outcomes + 1] = 0
  else
    local answered = answer(kind, KEYS[key], job, ttl, reply)
    if not answered then reason = 'reply_unwritable' end
    if reason ~= '' then bury(stream, id, reason) end
    redis.call('XDEL', stream, id)
    -- A detached job stays known as long as its result: its idempotency key must not run it again.
    redis.call('PEXPIRE', KEYS[key + 1], kind == 'string' and ttl or SEEN_AFTER_SETTLE_MS)
    outcomes[#outcomes + 1] = answered and 1 or -1
  end
  arg, key = arg + 7, key + 2
end
for reply_key, ttl in pairs(expiring) do redis.call('PEXPIRE', reply_key, ttl) end
return outcomes
