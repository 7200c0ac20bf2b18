"""Several models in one process, with more models than memory: which are loaded, and how they come and go.

Start with `pool.py`. The decisions are `worker/scheduling/residence.py` and `worker/scheduling/device_turn.py`.
"""
