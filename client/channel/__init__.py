"""One process's traffic with one server: what is asked of it, the thread that sends, those that read.

Imports nothing else of `client`. Start with `channel.py`.
"""
