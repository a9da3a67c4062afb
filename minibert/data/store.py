"""The token store: a corpus as memory-mapped token ids, with the borders of its sentences and documents.

tokens.bin     uint16, or uint32 where the vocabulary is larger: the ids of all sentences, end to end
sentences.bin  int64 [sentences + 1]: where each sentence begins in tokens.bin
documents.bin  int64 [documents + 1]: the first sentence of each document
meta.json      version, tokenizer hash, counts, sources; and the tokenizer's own files
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from minibert_kernels.philox import fold, philox

from ..files import fsync_path, sha256
from .sentences import split_sentences
from .text import as_paths, list_files, read_documents
from .tokenizer import Tokenizer

VERSION = 1
BATCH_CHARACTERS = 1 << 20  # text that is encoded at once


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


def build_store(
    paths,
    out,
    tokenizer: Tokenizer,
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> TokenStore:
    """Read text, split it into sentences, encode them and write a store; memory does not grow with the corpus.

    The store appears under `out` only when it is complete. One that is already there is returned as it is, if it was
    built from the same files (by content), tokenizer and options.
    Args:
        paths, text_column: as in `read_documents`.
        max_documents: stop after so many; None reads everything.
        progress: called after each batch with the counts so far.
    Raises:
        ValueError: the text cannot be read or is empty, or `out` holds something else.
    """
    out = Path(out)
    if max_documents is not None and (not isinstance(max_documents, int) or max_documents < 1):
        raise ValueError(f"max_documents={max_documents!r} is not a positive whole number")
    recipe = {
        "version": VERSION,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "text_column": text_column,
        "max_documents": max_documents,
        "sources": _sources(paths),
    }
    if _is_occupied(out):
        return _reuse(out, recipe)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise ValueError(f"{out} is no directory to write into ({error.strerror}): choose another output") from None
    try:
        documents = read_documents(paths, text_column=text_column)
        counts = _write_tokens(temporary, documents, tokenizer, np.dtype(recipe["dtype"]), max_documents, progress)
        tokenizer.save_pretrained(temporary)
        (temporary / "meta.json").write_text(json.dumps(recipe | {"counts": counts}, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            fsync_path(file)
        fsync_path(temporary)
        os.rename(temporary, out)
        fsync_path(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return TokenStore(out)


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


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _write_tokens(folder: Path, documents, tokenizer, dtype, max_documents, progress) -> dict[str, int]:
    """Stream documents into the three files; returns the counts."""
    counts = {"documents": 0, "sentences": 0, "tokens": 0, "unknown": 0, "characters": 0}
    with (
        open(folder / "tokens.bin", "wb") as tokens_file,
        open(folder / "sentences.bin", "wb") as sentences_file,
        open(folder / "documents.bin", "wb") as documents_file,
    ):
        sentences_file.write(np.zeros(1, np.int64))
        documents_file.write(np.zeros(1, np.int64))
        for document_ids, sentences in _batches(documents):
            left = None if max_documents is None else max_documents - counts["documents"]
            ids, lengths, per_document = _encode(tokenizer, document_ids, sentences, left)
            tokens_file.write(ids.astype(dtype))
            sentences_file.write(counts["tokens"] + np.cumsum(lengths))
            documents_file.write(counts["sentences"] + np.cumsum(per_document))
            counts["documents"] += len(per_document)
            counts["sentences"] += len(lengths)
            counts["tokens"] += len(ids)
            counts["unknown"] += int((ids == tokenizer.unk_token_id).sum())
            counts["characters"] += sum(map(len, sentences))
            if progress:
                progress(dict(counts))
            if counts["documents"] == max_documents:
                break
    if not counts["documents"]:
        raise ValueError("the text holds no document with a token in it")
    return counts


def _batches(documents: Iterable[list[str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Whole documents of about BATCH_CHARACTERS: the document number of each sentence, and the sentences."""
    numbers, sentences, size = [], [], 0
    for number, document in enumerate(documents):
        for paragraph in document:
            found = split_sentences(paragraph)
            sentences.extend(found)
            numbers.extend([number] * len(found))
            size += len(paragraph)
        if size >= BATCH_CHARACTERS:
            yield numbers, sentences
            numbers, sentences, size = [], [], 0
    if sentences:
        yield numbers, sentences


def _encode(tokenizer, document_ids, sentences, max_documents):
    """All ids [T], the length of each sentence that has any, and the number of those in each document that has any."""
    encoded = tokenizer.encode_plain(sentences)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    kept = np.flatnonzero(lengths)
    _, first, per_document = np.unique(np.asarray(document_ids)[kept], return_index=True, return_counts=True)
    if max_documents is not None and len(first) > max_documents:
        kept, per_document = kept[: first[max_documents]], per_document[:max_documents]
    ids = [np.asarray(encoded[i], dtype=np.int64) for i in kept]
    return np.concatenate(ids or [np.zeros(0, np.int64)]), lengths[kept], per_document.astype(np.int64)


def _sources(paths) -> list[dict]:
    files = [file for path in as_paths(paths) for file in list_files(path)]
    return [{"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files]


def _is_occupied(out: Path) -> bool:
    if out.is_dir():
        return any(out.iterdir())
    return out.exists()


def _reuse(out: Path, recipe: dict) -> TokenStore:
    """The store in `out` if it is what `recipe` would build."""
    if not (out / "meta.json").is_file():
        raise ValueError(f"{out} already exists and is no token store: choose another folder")
    store = TokenStore(out)
    different = [key for key, value in recipe.items() if store.meta.get(key) != value]
    if different:
        names = ", ".join(different)
        raise ValueError(f"{out} holds a store that differs in {names}: choose another folder, or delete this one")
    return store


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
