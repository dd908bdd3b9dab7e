"""Products and attention for a few rows, and their compilation and recording. Independent of models."""
