"""What runs tensors: caches, attention, linear layers, sampling. Nothing here knows of conversations."""
