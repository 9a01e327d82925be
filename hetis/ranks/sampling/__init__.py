"""Tokens and log-probabilities from logits, on the first primary of the last stage."""
