"""Text to packed, masked batches: documents, sentences, tokens, a store on disk, and samples drawn from counters."""

from .packing import PretrainingData
from .sentences import split_sentences
from .store import TokenStore, build_store, split_documents
from .text import read_documents
from .tokenizer import Tokenizer

__all__ = [
    "PretrainingData",
    "TokenStore",
    "Tokenizer",
    "build_store",
    "read_documents",
    "split_documents",
    "split_sentences",
]
