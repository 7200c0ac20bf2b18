"""A real local server: found, locked, started, adopted, stopped; never on a folder that others may write.

Imports `broker.contract` alone. Start with `embedded.py`.
"""
