"""Text generation: requests join and leave the running batch at every step. Imports torch and transformers.

`sequence.py` is one text as it grows; `sampling.py` chooses tokens. Nothing here knows the queue.
"""
