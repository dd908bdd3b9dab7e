"""Pages, figures, tables and model-card sections made from measured results."""
