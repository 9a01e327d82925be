"""Level 2: where the lanes of a sequence live. Functions of data: no clock, no socket, no tensor."""
