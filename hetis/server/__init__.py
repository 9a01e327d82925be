"""Level 8: the HTTP server: OpenAI's interface, health, metrics, pages."""
