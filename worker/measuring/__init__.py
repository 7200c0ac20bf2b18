"""Measurements of a starting worker: its cores, threads, the size and cost of a forward, its answer to fixed texts.

Imports `worker.models` and `worker.scheduling`. Start with `warmup.py`.
"""
