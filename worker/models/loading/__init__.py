"""Finds, checks and loads a model's folder, and tries the model before the first job.

`source.py`, `fetch.py`, `parts.py`, `files.py`, `foreign.py`, `whole.py`, `weights.py` and `exports.py` decide what may
be loaded. `limits.py`, `lengths.py` and `sharing.py` find out what the loaded model can do. Start with `library.py`.
"""
