"""Processes that claim jobs in batches, run the model and settle the answers."""
