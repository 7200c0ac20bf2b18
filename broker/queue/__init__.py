"""The verbs of the queue: enqueue, claim, settle, cancel, beat, release, reclaim. One Lua script is one verb.

Imports everything else of `broker`, and redis. Start with `streams.py` beside `lua/enqueue.lua`, `lua/claim.lua` and
`lua/settle.lua`: each script states its contract on top.
"""
