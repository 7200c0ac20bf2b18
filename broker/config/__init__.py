"""config.yaml and the environment as frozen models, with every error's file and line.

Imports `broker.contract` alone. Start with `spec.py`, which says what may be configured, then `load.py`.
"""
