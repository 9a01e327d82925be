"""Level 6: starts the processes of a fleet, alone or under torchrun."""
