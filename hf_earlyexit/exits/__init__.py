"""Exits: configuration, criteria, thresholds and exit heads."""
