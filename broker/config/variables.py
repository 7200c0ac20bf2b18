"""Names of the environment variables that millstream reads. yaml.py reads those that set values of config.yaml."""

from __future__ import annotations

URL_VARIABLE = "MILLSTREAM_REDIS_URL"
"""The server's URL. A supervisor passes it so to its children: an argument would show a password to all users."""

PREFIX_VARIABLE = "MILLSTREAM_REDIS__KEY_PREFIX"
"""Start of every key, also if there is no config.yaml."""

DATA_DIR_VARIABLE = "MILLSTREAM_DATA_DIR"
"""Folder in which a local server of this user keeps its data."""

PASSWORD_FILE_VARIABLE = "MILLSTREAM_REDIS_PASSWORD_FILE"
"""Path of the file with the server's password."""

INSECURE_VARIABLE = "MILLSTREAM_INSECURE"
"""If true, a server on another host without TLS and password is allowed."""

ALLOW_EVICTION_VARIABLE = "MILLSTREAM_ALLOW_EVICTION"
"""If true, a server that deletes keys when its memory is full is allowed."""

DEBUG_VARIABLE = "MILLSTREAM_DEBUG"
"""If not empty, commands print the traceback of an error, and workers log debug messages."""
