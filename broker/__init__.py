"""What clients and workers share: the queue itself, its words, its keys and its scripts. The only importer of redis."""
