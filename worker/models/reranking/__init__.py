"""Scores documents for a query, with one of four kinds of model. Start with `reranker.py`."""
