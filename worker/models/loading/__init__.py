"""Makes a model of a folder: found, looked over, loaded whole, and tried before the first job.

`source.py` to `exports.py` decide what may be loaded; `limits.py`, `lengths.py` and `sharing.py` find out what the
loaded model can do. Start with `loading.py`.
"""
