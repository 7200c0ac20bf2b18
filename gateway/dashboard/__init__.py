"""The web dashboard: pages on a server's services, and the few actions of an operator. Start reading at app.py.

Its figures and findings are those of the command line, from `broker/queue/`.
"""
