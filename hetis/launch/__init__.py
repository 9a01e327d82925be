"""Level 6: starts the processes of a fleet, with or without torchrun."""
