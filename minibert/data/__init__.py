"""Text to packed, masked batches: documents, sentences, tokens, a store on disk, and samples drawn from counters."""

from .build import build_store, merge_shards
from .mixture import Mixture
from .objectives import OBJECTIVES
from .packing import PretrainingData
from .parts import Recipe
from .sentences import split_sentences
from .store import TokenStore, split_documents
from .text import read_documents
from .tokenizer import Tokenizer

__all__ = [
    "Mixture",
    "OBJECTIVES",
    "PretrainingData",
    "Recipe",
    "TokenStore",
    "Tokenizer",
    "build_store",
    "merge_shards",
    "read_documents",
    "split_documents",
    "split_sentences",
]
