"""One process's traffic with one server: requests, the thread that sends them, the threads that read replies.

Imports no other module of `client`. Start with `channel.py`.
"""
