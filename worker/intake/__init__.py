"""The threads of a worker process beside the one that runs its model: what comes in, and what goes out.

Claims, prepares, settles, beats, tells callers what took too long. Imports `worker.scheduling` and `broker.queue`.
Start with `claimer.py`, then `settler.py`.
"""
