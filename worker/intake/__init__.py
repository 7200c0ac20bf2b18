"""Threads that bring jobs into a worker process and send answers out, besides the thread that runs the model.

They claim and prepare jobs, settle answers, send heartbeats, and end jobs that take too long. Imports
`worker.scheduling` and `broker.queue`. Start with `claimer.py`, then `settler.py`.
"""
