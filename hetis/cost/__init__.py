"""Level 1: what things cost in memory and time, as functions of plain data. Imports core and numpy only."""
