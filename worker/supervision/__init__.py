"""Worker processes seen from outside: started, watched, ended, and what they held given back.

Child and supervisor meet in `progress.py`, a page of shared memory. Imports `broker` and, for the plan of a process,
its models' names. Start with `supervisor.py`.
"""
