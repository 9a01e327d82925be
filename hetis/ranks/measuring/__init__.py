"""What a rank measures of its device and links before the first step, for the cost model."""
