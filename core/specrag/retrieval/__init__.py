"""Documents -> passages -> a FAISS index, kept on disk without pickle.

Files are read as text (txt, md, html, pdf), cut at sentence ends into passages of about a hundred words, and
embedded in batches straight into the index: memory holds the passages, the index and one batch.
"""

from specrag.retrieval.documents import SUFFIXES, Document, read_documents
from specrag.retrieval.index import PassageIndex, index_documents, read_passages
from specrag.retrieval.splitting import split_passages

__all__ = [
    "SUFFIXES",
    "Document",
    "PassageIndex",
    "index_documents",
    "read_documents",
    "read_passages",
    "split_passages",
]
