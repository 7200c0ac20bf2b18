-- Part of cancel_fair and purge_fair, behind fair.lua: takes a job that is deleted out of the index.

unindex = function(stream, id)
  local entry = redis.call('XRANGE', KEYS[stream], id, id)[1]
  if not entry then return end
  redis.call('ZREM', INDEX[stream], member(tenant_of(entry[2]), id))
  if redis.call('EXISTS', INDEX[stream]) == 0 then redis.call('DEL', TURN[stream]) end
end
