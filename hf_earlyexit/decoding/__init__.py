"""One `generate` call: its settings, the walk through the layers, the KV cache, the token loop."""
