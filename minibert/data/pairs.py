"""Samples of one segment or of two, as a pure function of (seed, epoch, index).

Each document is cut, once, into chunks: sentences are collected until a target length is reached, which is max_length
less the special tokens or, with probability `short_prob`, a random smaller one. When a chunk is read for pairs, it is
split between two of its sentences into A and B. What is too long is cut from the longer of the two, at its front or
back. In half of the samples, drawn by a coin,

    nsp  B is replaced by text from another document (Devlin et al., 2019, appendix A.2)
    sop  A and B change places (Lan et al., 2020, section 3.1)

Deviations: BERT reads the sentences again that a random B replaced, here they come back in another epoch, with another
draw; and a chunk of one sentence can only become A with a random B, so the others get a random B a little less often,
which keeps the share at one half wherever no more than half of the chunks are single sentences. ALBERT gives such a
chunk a random B too, and calls the pair swapped; here it is split in its middle, and one token alone has no label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minibert_kernels.philox import fold, philox

from ..batch import IGNORE
from ..config import one_of
from .store import TokenStore
from .tokenizer import Tokenizer

SHORT, PAIR, CUT = range(3)  # what is drawn
KINDS = ("nsp", "sop")


class Pair(NamedTuple):
    """One sample: ids [n] as [CLS] A [SEP] B [SEP], types [n], and its label, as in `Plan`."""

    ids: np.ndarray
    types: np.ndarray
    label: int


@dataclass(frozen=True)
class Plan:
    """Where k samples lie in the store: segment j of sample i is tokens[start[i, j] : start[i, j] + length[i, j]].

    start, length: [k, 2] int64, or [k, 1] without pairs.
    label: [k] int64, 0 where B follows A, or there is no pair; 1 where B is random or A and B are swapped.
    """

    start: np.ndarray
    length: np.ndarray
    label: np.ndarray

    def __getitem__(self, rows) -> "Plan":
        return Plan(*(column[rows] for column in self.columns()))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.start, self.length, self.label

    @property
    def sizes(self) -> np.ndarray:
        """[k]: tokens of each sample, [CLS] and [SEP] included."""
        return self.length.sum(1) + self.length.shape[1] + 1


class PairSampler:
    """The samples of some documents of a store: `len(sampler)` an epoch, `sampler(epoch, index)` is one of them.

    Args:
        max_length: the most tokens a sample may have, special tokens included.
        pairs: "nsp" or "sop"; None for single segments [CLS] A [SEP] of whole sentences of one document.
        short_prob: how often a chunk has a random smaller target.
        documents: ids to sample from, all by default.
    Raises:
        ValueError: max_length has no room, no documents, or only one where a random partner is needed.
    """

    def __init__(
        self,
        store: TokenStore,
        seed: int,
        max_length: int = 128,
        pairs: str | None = "nsp",
        short_prob: float = 0.1,
        documents: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if pairs is not None:
            one_of("pairs", pairs, KINDS)
        segments = 2 if pairs else 1
        self.room = max_length - segments - 1  # tokens of text
        if self.room < segments:
            raise ValueError(f"max_length={max_length} is too short: {segments + 1} are special tokens")
        if not 0 <= short_prob <= 1:
            raise ValueError(f"short_prob={short_prob} is not in [0, 1]")
        documents = np.arange(store.num_documents) if documents is None else np.unique(np.asarray(documents, np.int64))
        if len(documents) < 1 or documents[0] < 0 or documents[-1] >= store.num_documents:
            raise ValueError(f"documents must name some of the {store.num_documents} in the store")
        if pairs == "nsp" and len(documents) < 2:
            raise ValueError("next-sentence pairs need two documents or more: add documents, or leave nsp out")
        tokenizer = tokenizer or store.tokenizer
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.store, self.seed, self.pairs = store, seed, pairs
        self._pieces, first, last = _cut_long_sentences(store, documents, self.room)
        self._first, self._last = first, last  # pieces of each document
        self._chunks(short_prob)

    def __len__(self) -> int:
        return len(self._start)

    def __call__(self, epoch: int, index: int) -> Pair:
        plan = self.plan(np.array([epoch]), np.array([index]))
        ids, types = self.gather(plan)
        return Pair(ids, types, int(plan.label[0]))

    def plan(self, epoch: np.ndarray, index: np.ndarray) -> Plan:
        """The samples (epoch[i], index[i]); [k] int64 each. Every row depends on its own numbers alone."""
        first, last = self._pieces[self._start[index]], self._pieces[self._end[index]]
        if self.pairs is None:
            return Plan(first[:, None], (last - first)[:, None], np.zeros_like(first))
        draws = self._draw(PAIR, epoch, index)
        start, length, label = (self._next_sentence if self.pairs == "nsp" else self._sentence_order)(index, *draws)
        kept = _truncate(length, self.room)
        cut_front = np.stack(self._draw(CUT, epoch, index)[:2], 1) & 1
        return Plan(start + cut_front * (length - kept), kept, label)

    def _next_sentence(self, index, coin, split, other, place):
        """start [k, 2], length [k, 2] and label [k]: B follows A, or comes from another document."""
        start, end = self._start[index], self._end[index]
        count = end - start
        is_random = (count == 1) | (coin < self._random_below)
        middle = start + 1 + _below(split, np.maximum(count - 1, 1))
        a, a_length = self._pieces[start], self._pieces[middle] - self._pieces[start]
        document = _below(other, np.full_like(start, len(self._first) - 1))
        document += document >= self._document[index]  # any but its own
        first, last = self._first[document], self._last[document]
        b_first = np.where(is_random, first + _below(place, last - first), middle)
        wanted = self._pieces[b_first] + np.maximum(self._target[index] - a_length, 1)
        b_last = np.where(is_random, np.minimum(np.searchsorted(self._pieces, wanted), last), end)
        b, b_length = self._pieces[b_first], self._pieces[b_last] - self._pieces[b_first]
        return np.stack([a, b], 1), np.stack([a_length, b_length], 1), is_random.astype(np.int64)

    def _sentence_order(self, index, coin, split, *_):
        """start [k, 2], length [k, 2] and label [k]: B follows A, or A follows B."""
        start, end = self._start[index], self._end[index]
        count = end - start
        first, last = self._pieces[start], self._pieces[end]
        border = self._pieces[start + 1 + _below(split, np.maximum(count - 1, 1))]
        middle = np.where(count == 1, (first + last + 1) // 2, border)
        begins, length = np.stack([first, middle], 1), np.stack([middle - first, last - middle], 1)
        swapped = coin < 2**31
        flip = swapped[:, None]
        label = np.where(last - first > 1, swapped, IGNORE)
        return np.where(flip, begins[:, ::-1], begins), np.where(flip, length[:, ::-1], length), label

    def gather(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """The token ids and types of a plan's samples, end to end: [sum of plan.sizes] int64 each."""
        return frame(plan, self.store.tokens.__getitem__, self.cls_id, self.sep_id)

    def _draw(self, purpose: int, epoch, index):
        """Four 32-bit words a sample."""
        return philox(fold(self.seed, 0xBA125, purpose), index, index >> 32, epoch, epoch >> 32)

    def _chunks(self, short_prob: float) -> None:
        """Cut all documents side by side: one round a chunk, over the documents that still have text."""
        key = fold(self.seed, 0xBA125, SHORT)
        document, start = np.arange(len(self._first)), self._first.copy()
        rounds = []
        while len(document):
            coin, size, _, _ = philox(key, start, start >> 32)
            short = coin < short_prob * 2.0**32
            target = np.where(short, 2 + _below(size, np.full_like(start, max(self.room - 1, 1))), self.room)
            target = np.minimum(target, self.room)
            wanted = self._pieces[start] + target
            if self.pairs:  # the sentence that reaches the target is taken, and cut when read
                end = np.searchsorted(self._pieces, wanted)
            else:
                end = np.maximum(np.searchsorted(self._pieces, wanted, side="right") - 1, start + 1)
            end = np.minimum(end, self._last[document])
            rounds.append((document, start, end, target))
            more = end < self._last[document]
            document, start = document[more], end[more]
        columns = [np.concatenate(column) for column in zip(*rounds, strict=True)]
        order = np.argsort(columns[1])
        self._document, self._start, self._end, self._target = (column[order] for column in columns)
        single = int((self._end - self._start == 1).sum())
        count = len(order)
        share = (0.5 * count - single) / (count - single) if single < count else 0.0
        self._random_below = int(max(share, 0.0) * 2.0**32)


def frame(plan: Plan, read, cls_id: int, sep_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and types of a plan's samples with their special tokens; `read` gives the tokens at offsets."""
    segments = plan.length.shape[1]
    # each segment is framed on the right by [SEP], the first also on the left by [CLS]
    framed = plan.length + 1
    framed[:, 0] += 1
    starts, framed, length = plan.start.ravel(), framed.ravel(), plan.length.ravel()
    ends = np.cumsum(framed)
    ids = np.empty(ends[-1], dtype=np.int64)
    text = np.ones(ends[-1], dtype=bool)
    for place, token in ((ends - 1, sep_id), ((ends - framed)[::segments], cls_id)):
        ids[place] = token
        text[place] = False
    done = np.cumsum(length)
    ids[text] = read(np.repeat(starts - done + length, length) + np.arange(done[-1]))
    return ids, np.repeat(np.arange(len(framed)) % segments, framed)


def _cut_long_sentences(store: TokenStore, documents: np.ndarray, room: int):
    """Token offsets of pieces no longer than `room`, and the half-open range of pieces of each document."""
    sentences, borders = store.sentences, store.documents
    parts = -(-np.diff(sentences) // room)  # pieces of each sentence
    if parts.max() > 1:
        first_piece = np.concatenate([[0], np.cumsum(parts)])
        within = np.arange(first_piece[-1]) - np.repeat(first_piece[:-1], parts)
        # pieces of nearly equal length, so that none is a stump
        offsets = np.repeat(sentences[:-1], parts) + within * np.repeat(np.diff(sentences), parts) // np.repeat(
            parts, parts
        )
        sentences, borders = np.append(offsets, sentences[-1]), first_piece[borders]
    return sentences, borders[documents], borders[documents + 1]


def _below(word: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """A whole number in [0, bound) from 32 random bits; bound < 2**31."""
    return (word * bound) >> 32


def _truncate(length: np.ndarray, room: int) -> np.ndarray:
    """The lengths [k, 2] after taking tokens one by one from the longer segment, from B where equal, until they fit."""
    a, b = length.T
    kept = np.minimum(a, np.maximum(room - b, (room + 1) // 2))
    return np.stack([kept, np.minimum(b, room - kept)], 1)
