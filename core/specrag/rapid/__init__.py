"""RAPID: retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330)."""
