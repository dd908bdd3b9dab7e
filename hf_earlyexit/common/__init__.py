"""Helpers shared by all packages: text tables, atomic file writes, optional dependencies, versions."""
