"""Encoder inference: the same weights and token ids for everybody, at lengths of real texts.

Tokens come at random from the vocabulary: what a step costs does not depend on them. Batches keep the order of the
draw, as a data loader that shuffles has them; peers pad each to its longest. The suite `embed` begins with texts, and
counts tokenising and mean pooling too.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.config import BertConfig
from minibert.hub import load_config

from . import lengths, peers
from .gate import Once, judge
from .measure import Case, Work
from .peers import Encoder, Place

GATE_LENGTHS = (1, 7, 512, 23, 16, 200)  # uneven, so that a wrong mask is seen; the longest as long as what is timed
# what a name in the tables means: how an encoder is made at a place
PROVIDERS: dict[str, Callable[[Place], Encoder]] = {
    "minibert": peers.minibert,
    "minibert, padded call": peers.minibert_padded,
    "transformers eager": partial(peers.transformers, attention="eager"),
    "transformers sdpa": peers.transformers,
    "transformers sdpa, compiled": partial(peers.transformers, dynamic=True),
}
CUDA_PROVIDERS = {
    "minibert, graphs": peers.minibert_graphs,
    "minibert, compiled": partial(peers.minibert, dynamic=True),
    "minibert, reduce-overhead": partial(peers.minibert, mode="reduce-overhead", dynamic=False),
    "transformers sdpa, reduce-overhead": partial(peers.transformers, mode="reduce-overhead", dynamic=False),
}
CPU_PROVIDERS = {"onnxruntime": peers.onnx_runtime}
EMBEDDERS = {"minibert": peers.minibert_embedder, "sentence-transformers": peers.sentence_transformers_embedder}
BASELINE = "transformers sdpa"


def forward_flops(config: BertConfig, sizes: np.ndarray) -> float:
    """Multiplications and additions of the encoder's matrix products over sequences of these lengths."""
    d, f = config.hidden_size, config.intermediate_size
    token = 2 * (4 * d * d + 2 * d * f)
    return float(config.num_hidden_layers * (token * sizes.sum() + 4 * d * (sizes.astype(float) ** 2).sum()))


def random_ids(sizes, vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, size) for size in sizes]


class Reference:
    """What every encoder is judged by: transformers eager in float64 on a few uneven sequences; on a timed batch, which
    may be too large for that, transformers sdpa in float32, once it was judged itself. Both also in the precision
    of the case.
    """

    def __init__(self, place: Place):
        config = load_config(place.weights)
        self.ids = random_ids(gate_lengths(config), config.vocab_size, seed=1)
        self.words = [ids[: config.max_position_embeddings - 2] for ids in self.ids]
        self.texts = texts_of(self.words)
        self.place, self.once = place, Once()
        eager = partial(peers.transformers, attention="eager")
        self.truth = self._results(self._encoder(eager, torch.float64), self.ids, self.words)
        self.same = None
        if place.dtype != torch.float32:
            self.same = self._results(self._encoder(eager, place.dtype), self.ids, self.words)

    def _encoder(self, make, dtype: torch.dtype) -> Encoder:
        return make(replace(self.place, dtype=dtype))

    @staticmethod
    def _results(encoder, ids, words) -> dict[str, torch.Tensor]:
        embedded = states(encoder, list(map(framed, words))).split([len(one) + 2 for one in words])
        means = torch.stack([part.mean(0) for part in embedded])
        return {"states": states(encoder, ids, peers.pair_types(ids)), "embeddings": means}

    def _large(self, dtype: torch.dtype) -> Encoder:
        encoder = self._encoder(peers.transformers, dtype)
        if dtype == torch.float32:
            judge("transformers sdpa", self._results(encoder, self.ids, self.words), self.truth)
        return encoder

    def timed(self, ids: list[np.ndarray]) -> tuple[dict, dict | None]:
        """True results of a timed batch, and in the case's precision where that is lower."""

        def results(dtype):
            return self._results(self.once(dtype, lambda: self._large(dtype)), ids, words_of(ids))

        def both():
            return results(torch.float32), None if self.same is None else results(self.place.dtype)

        return self.once(tuple(map(len, ids)), both)

    def judged(
        self, name: str, make: Callable[[Place], Any], place: Place, results: Callable[..., dict],
        batch: list[np.ndarray], once: Once,
    ):  # fmt: skip
        """What `make(place)` gives, made once, and judged: in lower precision its float32 twin first, because rounding
        would hide a wrong formula; then on a batch that is timed.

        Args:
            results: of what was made: on the gate's sequences, or on those of a batch.
        Raises:
            Refused: its results differ.
        """

        def judge_at(place, same, label):
            made = make(place)
            found = results(made)
            judge(label, found, {what: self.truth[what] for what in found}, same)
            return made

        exact = replace(place, dtype=torch.float32)
        if place == exact:
            made = once((name, place), lambda: judge_at(place, None, name))
        else:
            once((name, exact), lambda: judge_at(exact, None, f"{name} in float32"))
            made = once((name, place), lambda: judge_at(place, self.same, name))
        found, (truth, same) = results(made, batch), self.timed(batch)
        judge(f"{name}, as timed", found, {what: truth[what] for what in found}, same)
        return made


def gate_lengths(config: BertConfig) -> list[int]:
    return [min(length, config.max_position_embeddings) for length in GATE_LENGTHS]


def texts_of(ids: list[np.ndarray]) -> list[str]:
    """Texts of whole words, for `peers.whole_words`; the tokenizer adds [CLS] and [SEP]."""
    return [" ".join(peers.word(max(int(i), 5)) for i in one) for one in ids]


def words_of(ids: list[np.ndarray]) -> list[np.ndarray]:
    """Without two tokens each, which the tokenizer's [CLS] and [SEP] take."""
    return [part[: max(len(part) - 2, 1)] for part in ids]


def framed(ids: np.ndarray) -> np.ndarray:
    """The ids of `texts_of`, with [CLS] and [SEP]."""
    return np.array([2, *np.maximum(ids, 5), 3])


@torch.inference_mode()
def states(encoder: Encoder, ids: list[np.ndarray], types: list[np.ndarray] | None = None) -> torch.Tensor:
    inputs = encoder.prepare(ids, types)
    return encoder.states(encoder.run(inputs), inputs).cpu()


def build(name: str, make: Callable[[Place], Encoder], place: Place, reference: Reference, batches, once: Once):
    """Judge an encoder, then the call that runs all batches."""

    def results(made, batch=reference.ids):
        return {"states": states(made, batch, peers.pair_types(batch))}

    encoder = reference.judged(name, make, place, results, batches[0], once)
    inputs = [encoder.prepare(batch, peers.pair_types(batch)) for batch in batches]

    @torch.inference_mode()
    def run():
        for batch in inputs:
            encoder.run(batch)

    return run


def build_embedder(name: str, make, place: Place, reference: Reference, batches, once: Once):
    """Judge what makes embeddings of texts, then the call that embeds them all."""

    @torch.inference_mode()
    def embeddings(embed, batch=None):
        return {"embeddings": embed(reference.texts if batch is None else texts_of(words_of(batch))).cpu()}

    embed = reference.judged(f"{name}, texts", make, place, embeddings, batches[0], once)
    texts = [text for batch in batches for text in texts_of(words_of(batch))]
    return torch.inference_mode()(lambda: embed(texts))


def cases(
    weights: Path, config: BertConfig, *, names, dtypes, threads, batch_size: int, num_batches: int, longest: int,
    device: str = "cpu", backend: str = "auto", only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Case]:  # fmt: skip
    """Two cases for every distribution of lengths, precision and number of threads: from ids, and from texts."""
    providers, once = PROVIDERS | (CUDA_PROVIDERS if device == "cuda" else CPU_PROVIDERS), Once()
    embedders = {provider: partial(make, batch_size=batch_size) for provider, make in EMBEDDERS.items()}
    for dtype in dtypes:
        for count in threads:
            place = Place(weights=weights, dtype=dtype, device=device, threads=count, backend=backend)
            torch.set_num_threads(count)
            reference = Reference(place)
            for name in names:
                sizes = lengths.sample(name, batch_size * num_batches, longest)
                ids = random_ids(sizes, config.vocab_size)
                batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
                labels = {
                    "dtype": str(dtype).removeprefix("torch."), "threads": count,
                    "fill": round(float(sizes.sum() / padded_tokens(sizes, batch_size)), 3),
                }  # fmt: skip
                work = Work(tokens=int(sizes.sum()), sequences=len(sizes), flops=forward_flops(config, sizes))
                yield Case(
                    suite="infer", name=f"{name}, batch {batch_size}", labels=labels, work=work, baseline=BASELINE,
                    providers={
                        provider: partial(build, provider, make, place, reference, batches, once)
                        for provider, make in providers.items() if only(provider)
                    },
                )  # fmt: skip
                yield Case(
                    suite="embed", name=f"{name}, texts, batch {batch_size}", labels=labels, work=work,
                    baseline="sentence-transformers",
                    providers={
                        provider: partial(build_embedder, provider, make, place, reference, batches, once)
                        for provider, make in embedders.items() if only(provider)
                    },
                )  # fmt: skip


def padded_tokens(sizes: np.ndarray, batch_size: int) -> int:
    """Tokens of the batches, each padded to its longest."""
    parts = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
    return sum(len(part) * part.max() for part in parts)
