"""Level 2: decides which tokens the next step computes. Functions of data: no clock, no socket, no tensor."""
