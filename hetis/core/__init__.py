"""Level 0: plain data that all other parts share. Imports the standard library and msgspec; the step command numpy."""
