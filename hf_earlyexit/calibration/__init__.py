"""Finding exit settings that keep a risk target, and testing the guarantee."""
