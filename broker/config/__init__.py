"""config.yaml and the environment as frozen models. Each error names its file and line.

Imports only `broker.contract`. Start with `spec.py`, which defines every setting, then read `load.py`.
"""
