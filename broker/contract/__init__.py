"""The types that clients and workers share, and their encoding: jobs, replies, errors, keys, types of
models and their options.

Imports nothing else of millstream: no I/O, no clock, no Redis. Start with `job.py`, then `entry_codec.py` and
`codec.py`; docs/protocol.md describes the format for authors of other clients.
"""
