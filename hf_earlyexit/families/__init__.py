"""Model families: the only code that depends on the internals of a library model, one folder per family."""
