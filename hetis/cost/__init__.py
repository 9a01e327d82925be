"""Level 1: costs in memory and time, as functions of plain data. Imports core and numpy only."""
