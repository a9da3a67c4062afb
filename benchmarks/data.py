"""From text to packed, masked batches: is the data ever the bottleneck?

Texts are random words of the vocabulary, in sentences and documents as long as Wikipedia's. The rate to beat is the
training step's useful tokens/s, which the suite `train` gives.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from minibert import Tokenizer
from minibert.data import PretrainingData, build_store

from . import lengths, peers
from .gate import Refused
from .measure import Case, Work

BATCH_TOKENS, NUM_BATCHES, LENGTH = 4096, 50, 128


def write_texts(folder: Path, num_documents: int) -> tuple[list[str], Tokenizer]:
    """Documents as one file of lines, with an empty line between them, and a tokenizer trained on them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters[:12], rng.integers(2, 9))) for _ in range(4000)]
    rank = 1 / np.arange(1, len(words) + 1)
    sizes = lengths.sample("enwiki2015_paragraphs_6files", num_documents)
    documents = [
        "\n".join(" ".join(rng.choice(words, 18, p=rank / rank.sum())) + "." for _ in range(max(size // 9, 2)))
        for size in sizes
    ]
    (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    lines = [line for document in documents for line in document.split("\n")]
    return lines, Tokenizer.train(lines, 2000)


def tokenize(tokenizer: Tokenizer, lines: list[str]) -> Callable[[], object]:
    return lambda: tokenizer(lines).input_ids


def tokenize_theirs(tokenizer: Tokenizer, lines: list[str], folder: Path) -> Callable[[], object]:
    theirs = peers.hf_tokenizer(tokenizer, folder)
    if [list(ids) for ids in theirs(lines[:200]).input_ids] != [list(ids) for ids in tokenizer(lines[:200]).input_ids]:
        raise Refused("transformers: its tokens differ from minibert's")
    return lambda: theirs(lines).input_ids


def batches(store, tokenizer: Tokenizer) -> Callable[[], object]:
    data = PretrainingData(store, tokenizer, max_length=LENGTH, batch_tokens=BATCH_TOKENS)
    return lambda: [batch for batch, _ in islice(data.batches(), NUM_BATCHES)]


def batches_theirs(store, tokenizer: Tokenizer, folder: Path) -> Callable[[], object]:
    """transformers' collator for masked language modelling, on samples that are already cut and tokenised."""
    data = PretrainingData(store, tokenizer, max_length=LENGTH, batch_tokens=BATCH_TOKENS, nsp=False)
    samples = []
    for batch, _ in islice(data.batches(), NUM_BATCHES):
        ids = batch.input_ids.clone()
        ids[batch.mlm_rows] = batch.mlm_labels
        samples.append([{"input_ids": part} for part in torch.split(ids, list(batch.lengths))])
    collate = peers.hf_collator(tokenizer, folder)
    return lambda: [collate(part) for part in samples]


def cases(num_documents: int = 2000) -> Iterator[Case]:
    """Text to ids, and stored ids to batches; one thread in each, as torch has no part in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, tokenizer = write_texts(folder, num_documents)
        tokens = sum(map(len, tokenizer(lines).input_ids))
        yield Case(
            suite="data", name="text to ids", work=Work(tokens=tokens, sequences=len(lines)),
            providers={
                "minibert": partial(tokenize, tokenizer, lines),
                "transformers": partial(tokenize_theirs, tokenizer, lines, folder),
            },
            baseline="transformers",
        )  # fmt: skip
        store = build_store([str(folder / "corpus.txt")], folder / "store", tokenizer)
        made = batches(store, tokenizer)()
        yield Case(
            suite="data", name="stored ids to masked batches",
            work=Work(tokens=sum(b.num_tokens for b in made), sequences=sum(b.num_sequences for b in made)),
            providers={
                "minibert": partial(batches, store, tokenizer),
                "transformers collator": partial(batches_theirs, store, tokenizer, folder),
            },
            baseline="transformers collator",
        )  # fmt: skip
