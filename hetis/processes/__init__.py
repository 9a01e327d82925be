"""Level 1: processes of one host: how they start, end and wake each other, what they may use, and why a job failed."""
