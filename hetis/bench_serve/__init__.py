"""Level 8: a load generator that measures any OpenAI-compatible server over HTTP. Never starts a fleet, never torch."""
