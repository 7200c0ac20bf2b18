"""Vectors of texts. `tokens.py` makes rows, `encoder.py` runs them, `embedding.py` answers jobs. Start there."""
