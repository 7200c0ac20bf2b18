"""Runs rows on a model, forward by forward, in the main thread of a worker process, or on a server that already runs.

Imports neither `broker.queue` nor `broker.transport`. Start with `runner.py`; for servers with `upstream.py`.
"""
