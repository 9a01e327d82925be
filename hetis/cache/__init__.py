"""Level 2: which page belongs to which lane, and which lanes are on the move. Functions of data, like the scheduler."""
