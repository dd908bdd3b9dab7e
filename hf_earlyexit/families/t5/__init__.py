"""T5: model classes and the decoder adapters (library blocks, prepared, compiled, CUDA graphs)."""
