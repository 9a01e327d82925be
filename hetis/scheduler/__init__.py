"""Level 2: which tokens are computed next. Functions of data: no clock, no socket, no tensor."""
