"""Metrics, traces and logs of clients and workers, with the names of each in one module.

Imported by client, worker and cli; imports `broker` and the libraries of telemetry, which nothing else imports. Each of
these libraries is an extra, and is imported only if it is asked for.
"""
