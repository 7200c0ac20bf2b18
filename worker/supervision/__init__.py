"""Starts, watches and ends worker processes, and gives the jobs of dead ones back.

Child and supervisor share `progress.py`, a page of shared memory. Imports `broker` and, for the plan of a process, the
names of its models. Start with `supervisor.py`.
"""
