"""Decisions as plain functions of their arguments: what to claim, which rows run together, who comes first.

Imports no Redis client, no thread, no clock and no randomness, so each rule is tested by itself. Start with
`batcher.py`.
"""
