"""Scores of documents for a query, by any of three kinds of model. Start with `reranker.py`."""
