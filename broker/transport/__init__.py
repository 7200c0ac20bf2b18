"""The way to the server: clients with our own timeouts, Clusters, Sentinels, errors of the library mapped to ours.

Imports `broker.config`, `broker.server` and `broker.contract`. It and `broker.queue` alone import redis. Start with
`connection.py`.
"""
