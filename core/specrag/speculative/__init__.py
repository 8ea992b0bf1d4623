"""Speculative RAG: passages -> drafts -> verdicts -> the answer (Wang et al., arXiv 2407.08223).

``pipeline`` runs the stages: ``perspectives`` chooses what each draft reads, ``drafting`` makes the drafts,
``verification`` scores them, and ``selection`` picks the answer. ``prompts`` holds every text that the models see.
``work`` tells adapters what begins and ends.
"""
