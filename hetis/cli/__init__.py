"""Level 8: the commands of `hetis`."""
