"""The nouns that clients and workers agree on, and their bytes: jobs, replies, errors, keys, options of vectors.

Imports nothing else of millstream: no I/O, no clock, no Redis. Start with `job.py`, then `codec.py`; docs/protocol.md
is the same for writers of other clients.
"""
