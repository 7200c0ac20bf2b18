-- Part of settle_fair, behind fair.lua: lets the next job of a tenant run that has max_in_flight.

if redis.call('EXISTS', TENANTS) == 1 then free_job = free end
