"""Level 7: the Python interface: `LLM`, prompts, detokenisation, and the connection to the driver."""
