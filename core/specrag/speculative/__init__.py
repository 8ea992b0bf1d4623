"""Speculative RAG: passages -> drafts -> verdicts -> the answer (Wang et al., arXiv 2407.08223)."""
