"""Level 0: plain frozen data that every other part shares. Imports the standard library and msgspec only."""
