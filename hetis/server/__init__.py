"""Level 6: what users touch: `LLM`, the command line, and the starting of processes."""
