"""The token store: a corpus as memory-mapped token ids, with the borders of its sentences and documents.

tokens.bin     uint16, or uint32 where the vocabulary is larger: the ids of all sentences, end to end
sentences.bin  int64 [sentences + 1]: where each sentence begins in tokens.bin
documents.bin  int64 [documents + 1]: the first sentence of each document
meta.json      version, tokenizer hash, counts, sources; and the tokenizer's own files
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from minibert_kernels.philox import fold, philox

from .tokenizer import Tokenizer

VERSION = 1


class TokenStore:
    """A store on disk, opened without reading it; any number of processes may share one.

    Attributes: path, meta, num_documents, num_sentences, num_tokens, and the arrays tokens [num_tokens],
    sentences [num_sentences + 1] and documents [num_documents + 1].
    Raises ValueError where the folder holds no store, or one that is broken or cut off.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        counts = self.meta["counts"]
        self.num_documents, self.num_sentences = counts["documents"], counts["sentences"]
        self.num_tokens = counts["tokens"]
        self.tokens = self._map("tokens.bin", self.meta["dtype"], self.num_tokens)
        self.sentences = self._map("sentences.bin", "int64", self.num_sentences + 1)
        self.documents = self._map("documents.bin", "int64", self.num_documents + 1)
        for name, array, last in (
            ("sentences", self.sentences, self.num_tokens),
            ("documents", self.documents, self.num_sentences),
        ):
            if array[0] != 0 or array[-1] != last:
                raise ValueError(f"{self.path / name}.bin does not fit meta.json: build the store again")

    def __reduce__(self):
        return TokenStore, (self.path,)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was built with."""
        return Tokenizer.from_pretrained(self.path)

    def sentence(self, i: int) -> np.ndarray:
        """The token ids of sentence i."""
        return self.tokens[self.sentences[i] : self.sentences[i + 1]]

    def document(self, i: int) -> tuple[int, int]:
        """The sentences of document i, as a half-open range."""
        return int(self.documents[i]), int(self.documents[i + 1])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        file, dtype = self.path / name, np.dtype(dtype)
        size = file.stat().st_size if file.is_file() else -1
        if size != count * dtype.itemsize:
            problem = "is missing" if size < 0 else f"has {size} bytes, expected {count * dtype.itemsize}"
            raise ValueError(f"{file} {problem}: build the store again")
        # a plain array over the map: indexing np.memmap itself is several times slower
        return np.asarray(np.memmap(file, dtype=dtype, mode="r"))


def split_documents(
    num_documents: int, valid_fraction: float, seed: int, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training and of the held-out documents, both ascending; a pure function of its arguments.

    Where valid_fraction > 0, each side gets `at_least` documents.
    Raises:
        ValueError: valid_fraction out of range, or fewer than 2 * at_least documents to split.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction={valid_fraction} is not in [0, 1)")
    count = 0
    if valid_fraction > 0:
        if num_documents < 2 * at_least:
            raise ValueError(
                f"there are {num_documents} documents: training and held-out text need {at_least} each: add documents"
            )
        count = min(max(round(valid_fraction * num_documents), at_least), num_documents - at_least)
    ids = np.arange(num_documents, dtype=np.int64)
    key, tie_break, _, _ = philox(fold(seed, 0x5B117), ids)
    order = np.lexsort((tie_break, key))
    return np.sort(order[count:]), np.sort(order[:count])


def _read_meta(path: Path) -> dict:
    file = path / "meta.json"
    if not file.is_file():
        raise ValueError(f"{path} is no token store: it has no meta.json")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            raise ValueError(f"{file}: version {meta['version']}, expected {VERSION}: build the store again")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"{file}: dtype {meta['dtype']!r} is not one of uint16, uint32")
        for name in ("documents", "sentences", "tokens"):
            if not isinstance(meta["counts"][name], int) or meta["counts"][name] < 1:
                raise ValueError(f"{file}: {name} is {meta['counts'][name]!r}, expected a positive whole number")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is broken ({error!r}): build the store again") from None
    return meta
