"""Starts, adopts and stops a local Redis or Valkey server. Never uses a data dir that other users may write.

Imports only `broker.contract`. Start with `embedded.py`.
"""
