"""Level 5: the process around the engine: start-up, serving, deaths of ranks, profiles, traces. Never torch."""
