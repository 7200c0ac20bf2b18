"""Runs rows on a model, forward by forward, in the main thread of a worker process.

Imports neither `broker.queue` nor `broker.transport`. Start with `runner.py`.
"""
