"""The KV cache: which page belongs to which lane (host half, never torch) and the pages themselves (`pool.py`)."""
