"""Level 7: what Python users touch: `LLM`, prompts, tokens to text, and the connection to the driver."""
