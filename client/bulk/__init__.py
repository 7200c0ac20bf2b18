"""Offline jobs: a file of any size in, a folder of results out, in bounded memory; a run that ended early goes on.

It uses detached calls, and so imports `client`; only `client.client` and `cli` import it. Start with `run.py`: it reads
shards from a source (`sources.py`), sends their rows (`sending.py`), and writes each finished shard with a sink
(`sinks.py`) before it notes it in the manifest (`manifest.py`).
"""
