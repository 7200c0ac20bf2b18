"""Decisions as pure functions: what to claim, which rows run together, which jobs run first.

Imports no Redis client, no thread, no clock and no randomness, so each rule can be tested by itself. Start with
`batcher.py`.
"""
