"""What runs tensors: caches, attention, linear layers, sampling. It knows models, and no conversation."""
