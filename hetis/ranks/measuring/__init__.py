"""Measurement of a rank's device and links before the first step, for the cost model."""
