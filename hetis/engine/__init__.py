"""Level 3: requests in, steps out, tokens back. Pure: no clock, socket, file, process or torch."""
