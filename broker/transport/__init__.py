"""Connects to the server: clients with our own timeouts, Clusters, Sentinels, the library's errors mapped to ours.

Imports `broker.config`, `broker.server` and `broker.contract`. Only this folder and `broker.queue` import redis. Start
with `connection.py`.
"""
