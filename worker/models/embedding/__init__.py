"""Embedding models. `tokens.py` tokenizes texts, `encoder.py` runs them, `embedding.py` answers jobs: start there."""
