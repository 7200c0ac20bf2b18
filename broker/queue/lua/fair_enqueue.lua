-- Part of enqueue_fair, behind fair.lua: indexes what is accepted, wakes workers, and limits the jobs of each tenant.

if spec[11] == 'tenant' then
  -- Most idle workers that one call wakes: they sleep by the bell, since the streams' own order is not that of claims.
  local RINGS = 16
  local per_tenant_limit = tonumber(spec[12])
  local rings, joined, waiting = 0, {}, {}

  local function count_jobs(priority, tenant)
    local name = priority .. tenant
    waiting[name] = waiting[name]
      or redis.call('ZLEXCOUNT', INDEX[priority], '[' .. tenant .. '\0', '(' .. tenant .. '\1')
    return waiting[name]
  end

  tenant_limit = function(priority, arg, jobs)
    if not per_tenant_limit then return end
    local already = count_jobs(priority, known_tenant(ARGV[arg + 7]))
    return already + jobs > per_tenant_limit and per_tenant_limit
  end

  index_job = function(priority, name, id)
    local tenant = known_tenant(name)
    redis.call('ZADD', INDEX[priority], 0, member(tenant, id))
    local each = priority .. tenant
    if not joined[each] then join(priority, tenant) end
    joined[each] = true
    if waiting[each] then waiting[each] = waiting[each] + 1 end
    rings = rings + 1
    if rings <= RINGS then redis.call('XADD', BELL, 'MAXLEN', RINGS, '*', 'new', '1') end
  end
end
