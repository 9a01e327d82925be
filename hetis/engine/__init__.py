"""Level 5: the driver, the one process that decides. It never imports torch."""
