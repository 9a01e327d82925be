"""Level 4: processes with a device. Primaries run the model; attention workers hold cache and attend over it."""
