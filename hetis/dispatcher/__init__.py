"""Placement: which device holds which lane. Functions of data: no clock, no socket, no tensor."""
