"""Training and fitting exits: trainer, objectives, adapters, shortcuts, model cards."""
