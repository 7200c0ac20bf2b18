"""Faster forwards that prove equal to the library's: packed texts, oneDNN's linear layers, batches sent ahead."""
