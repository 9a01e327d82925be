"""Level 2: which page belongs to which lane, and which lanes migrate. Functions of data, like the scheduler."""
