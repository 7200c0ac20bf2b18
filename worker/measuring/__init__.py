"""What a worker finds out as it starts: its cores, the threads, the size and the cost of a forward, its own answer.

Imports `worker.models` and `worker.scheduling`. Start with `warmup.py`.
"""
