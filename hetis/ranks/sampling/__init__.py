"""From logits to tokens and their log-probabilities, on the last stage's first primary."""
