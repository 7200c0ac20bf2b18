-- Part of cancel_fair and purge_fair, behind fair.lua: takes a job that is deleted out of the index, and out of those
-- in flight if a worker gave it back.

unindex = function(stream, id)
  local entry = redis.call('XRANGE', KEYS[stream], id, id)[1]
  if not entry then return end
  redis.call('ZREM', INDEX[stream], member(tenant_of(entry[2]), id))
  end_turns(stream)
  free(stream, id)
end
