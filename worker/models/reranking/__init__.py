"""Scores documents for a query, with one of three kinds of model. Start with `reranker.py`."""
