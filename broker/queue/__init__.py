"""The operations of the queue: enqueue, claim, settle, cancel, beat, release, reclaim, purge. Each is one Lua script.

Imports everything else of `broker`, and redis. Start with `streams.py` beside `lua/enqueue.lua`, `lua/claim.lua` and
`lua/settle.lua`: each script states its contract at its top.
"""
