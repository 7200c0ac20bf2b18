"""The queue that clients and workers share: its types, keys and scripts. Nothing else of millstream imports redis."""
