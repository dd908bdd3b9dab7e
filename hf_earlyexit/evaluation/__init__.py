"""Evaluation of models on data: generated texts, quality metrics, oracle, time."""
