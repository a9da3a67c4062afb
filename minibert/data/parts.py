"""The first step of a build: every file becomes a part, tokenised, in the order of its documents.

A part follows from its file and the recipe alone. So any number of processes and machines may make them, and a build
that was killed goes on with those that are there.

tokens.bin      uint16 or uint32, as in the store: the ids of all sentences, end to end
sentences.bin   int32 [sentences]: the tokens of each
documents.bin   DOCUMENT [documents]
signatures.bin  uint32 [documents, SIGNATURE], where near duplicates are left out
part.json       counts, and what was left out; the parts that have one are whole
"""

import functools
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..files import sha256
from .clean import clean_paragraph, count_words, document_key, normal_form, share_of_letters, signature
from .sentences import split_sentences
from .store import VERSION
from .text import read_file
from .tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # text that is encoded at once
CHUNK = 128  # documents that are read at once from a part
DOCUMENT = np.dtype([("key", "<u8"), ("sentences", "<i8"), ("characters", "<i8")])
FILES = ("tokens.bin", "sentences.bin", "documents.bin", "signatures.bin")
Progress = Callable[[dict[str, int]], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to text on its way into a store; the store keeps it in meta.json.

    text_column: the column or field that holds the text of a row.
    max_documents: read no more than so many.
    on_bad_record: `skip` leaves out what cannot be read, a line or row, and counts it.
    clean: see `clean_paragraph`. min_words, min_letters: leave out documents with fewer words, or with a
        smaller share of letters.
    dedup: keep the first of the documents with one normal form.
    near_dedup: leave out documents as similar as this to an earlier one, see `find_similar`; None keeps them.
    valid, test: the shares of documents that go to stores of their own, chosen by their normal form.
    """

    text_column: str = "text"
    max_documents: int | None = None
    on_bad_record: Literal["fail", "skip"] = "fail"
    clean: bool = False
    min_words: int = 0
    min_letters: float = 0.0
    dedup: bool = False
    near_dedup: float | None = None
    valid: float = 0.0
    test: float = 0.0

    def __post_init__(self):
        if self.max_documents is not None and (not isinstance(self.max_documents, int) or self.max_documents < 1):
            raise ValueError(f"max_documents={self.max_documents!r} is not a positive whole number")
        if self.on_bad_record not in ("fail", "skip"):
            raise ValueError(f"on_bad_record={self.on_bad_record!r} is not one of fail, skip")
        if self.min_words < 0:
            raise ValueError(f"min_words={self.min_words} is negative")
        for name in ("min_letters", "valid", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1)")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid={self.valid} and test={self.test} leave nothing to train on")
        if self.near_dedup is not None and not 0.3 <= self.near_dedup <= 1:
            raise ValueError(f"near_dedup={self.near_dedup} is not in [0.3, 1]")

    @property
    def stores(self) -> list[str]:
        """The folders below the output that are stores; "" is the output itself."""
        sides = [name for name in ("valid", "test") if getattr(self, name)]
        return ["train", *sides] if sides else [""]


class Text(NamedTuple):
    """A document that is about to be encoded; signature is None where none is needed."""

    sentences: list[str]
    key: int
    signature: np.ndarray | None


def settings_of(tokenizer: Tokenizer, recipe: Recipe) -> dict:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    known = {"version": VERSION, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "dtype": dtype}
    return known | asdict(recipe)


def source_of(file: Path) -> dict:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def part_name(settings: dict, source: dict) -> str:
    """The folder of a part: a hash of everything that it follows from."""
    return hashlib.sha256(json.dumps([settings, source], sort_keys=True).encode()).hexdigest()[:32]


def make_parts(files, targets, tokenizer: Tokenizer, recipe: Recipe, workers: int, progress) -> list[dict]:
    """Make the parts that are not there yet; returns the counts of all, or of as many as max_documents needs.

    Beside the targets lies the tokenizer's folder, for the workers.
    """
    done = {target: counts for target in targets if (counts := part_counts(target)) is not None}
    todo = {target: file for file, target in zip(files, targets, strict=True) if target not in done}
    known, total = [], Counter()
    with ExitStack() as stack:
        if min(workers, len(todo)) > 1:
            pool = ProcessPoolExecutor(
                min(workers, len(todo)), get_context("fork"), _begin_work, (targets[0].parent / "tokenizer",)
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            work = {target: pool.submit(_work, file, target, recipe).result for target, file in todo.items()}
        else:
            make = functools.partial(_make_part, tokenizer=tokenizer, recipe=recipe)
            work = {target: functools.partial(make, file, target) for target, file in todo.items()}
        for target in targets:
            if target not in done:
                done[target] = work[target]()
            known.append(done[target])
            total.update({name: known[-1][name] for name in ("documents", "sentences", "tokens")})
            if progress:
                progress({"files": len(known), "of": len(targets), **total})
            if recipe.max_documents is not None and total["documents"] >= recipe.max_documents:
                break
    return known


_tokenizers: list[Tokenizer] = []  # of a worker: one, read once


def _begin_work(tokenizer: Path) -> None:
    """A worker's first act: an interrupt is the parent's business, and without a parent there is no work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent_process().pid,), daemon=True).start()
    _tokenizers.append(Tokenizer.from_pretrained(tokenizer))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(file: Path, target: Path, recipe: Recipe) -> dict:
    return _make_part(file, target, _tokenizers[0], recipe)


def part_counts(part: Path) -> dict | None:
    """What part.json says, or None where the part is missing or cut off."""
    try:
        counts = json.loads((part / "part.json").read_text(encoding="utf-8"))
        whole = all((part / name).stat().st_size == size for name, size in counts["bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return counts if whole else None


def _make_part(file: Path, target: Path, tokenizer: Tokenizer, recipe: Recipe) -> dict:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    for folder in (target, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.mkdir()
        counts = _write_part(file, temporary, tokenizer, recipe)
        counts["bytes"] = {entry.name: entry.stat().st_size for entry in sorted(temporary.iterdir())}
        (temporary / "part.json").write_text(json.dumps(counts), encoding="utf-8")
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return counts


def _write_part(file: Path, folder: Path, tokenizer: Tokenizer, recipe: Recipe) -> dict:
    """Stream the documents of a file into the arrays of a part; returns the counts."""
    counts, left_out = Counter(read=0, documents=0, sentences=0, tokens=0), Counter()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with ExitStack() as stack:
        names = FILES if recipe.near_dedup is not None else FILES[:-1]
        streams = [stack.enter_context(open(folder / name, "wb")) for name in names]
        for batch in _batches(_texts(file, recipe, counts, left_out)):
            ids, lengths = _encode(tokenizer, [sentence for text in batch for sentence in text.sentences], dtype)
            owner = np.repeat(np.arange(len(batch)), [len(text.sentences) for text in batch])
            per_document = np.bincount(owner[lengths > 0], minlength=len(batch))
            kept = per_document > 0
            left_out["without tokens"] += int((~kept).sum())
            documents = np.zeros(len(batch), DOCUMENT)
            documents["key"] = [text.key for text in batch]
            documents["sentences"] = per_document
            documents["characters"] = [sum(map(len, text.sentences)) for text in batch]
            arrays = [ids, lengths[lengths > 0].astype(np.int32), documents[kept]]
            if recipe.near_dedup is not None:
                arrays.append(np.stack([text.signature for text in batch])[kept])
            for stream, array in zip(streams, arrays, strict=True):
                stream.write(np.ascontiguousarray(array))
            counts.update(documents=int(kept.sum()), sentences=len(arrays[1]), tokens=len(ids))
            if recipe.max_documents is not None and counts["documents"] >= recipe.max_documents:
                break
    return {**counts, "left_out": {name: count for name, count in left_out.items() if count}}


def _texts(file: Path, recipe: Recipe, counts: Counter, left_out: Counter) -> Iterator[Text]:
    """The documents of a file that the recipe keeps, cleaned and split."""

    def bad(error: ValueError) -> None:
        if recipe.on_bad_record == "fail":
            raise error
        left_out["bad records"] += 1

    for document in read_file(file, recipe.text_column, bad):
        counts["read"] += 1
        if recipe.clean:
            document = [paragraph for text in document if (paragraph := clean_paragraph(text))]
        if recipe.min_words and count_words(document) < recipe.min_words:
            left_out["too few words"] += 1
        elif recipe.min_letters and share_of_letters(document) < recipe.min_letters:
            left_out["too few letters"] += 1
        else:
            normal = normal_form(document)
            sentences = [sentence for paragraph in document for sentence in split_sentences(paragraph)]
            marks = signature(normal) if recipe.near_dedup is not None else None
            yield Text(sentences, document_key(normal), marks)


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Whole documents of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += sum(map(len, text.sentences))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, sentences: list[str], dtype) -> tuple[np.ndarray, np.ndarray]:
    """All ids [T], and the length of each sentence; what one call encodes is bounded, so a long document is, too."""
    ids, lengths, start = [], [], 0
    borders = np.cumsum([len(sentence) for sentence in sentences]) // BATCH_CHARACTERS
    for end in [*np.flatnonzero(np.diff(borders)) + 1, len(sentences)]:
        for encoded in tokenizer.encode_plain(sentences[start:end]):
            ids.append(np.array(encoded, dtype=dtype))
            lengths.append(len(encoded))
        start = end
    return np.concatenate(ids or [np.zeros(0, dtype)]), np.array(lengths, dtype=np.int64)


def read_part(part: Path, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The documents of a part, CHUNK at a time: their records, the lengths of their sentences, and their ids."""
    with ExitStack() as stack:
        names = ("documents.bin", "sentences.bin", "tokens.bin")
        records, sentences, tokens = (stack.enter_context(open(part / name, "rb")) for name in names)
        while len(documents := np.fromfile(records, DOCUMENT, CHUNK)):
            lengths = np.fromfile(sentences, np.int32, documents["sentences"].sum())
            yield documents, lengths, np.fromfile(tokens, dtype, lengths.sum())
