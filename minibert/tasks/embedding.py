"""Embeddings: vectors of texts that are near each other where the texts mean the same (Reimers and Gurevych, 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import BertConfig, one_of
from ..data.records import Record
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForSentenceEmbedding
from ..model.task_heads import PAIR_LOSSES, POOLINGS
from . import metrics
from .base import Example, Task, as_numpy
from .classification import Regression
from .labels import check_length, distance, pair_fields, read_again, texts_of

NEAREST = 1024  # pairs whose first texts are compared with all second ones at once


@dataclass(frozen=True, kw_only=True)
class Embedding(Task):
    """Vectors of pairs of texts; Pearson's and Spearman's correlation of their cosine with the label.

    loss: `cosine` learns labels from 0 to `scale`, as similarities; `contrastive` takes the pairs with a label of
    `positive` or more, or all that have none, for the same in other words, and the other texts of the batch for others
    (Henderson et al., 2017), and is measured by the share of those pairs whose second text is the nearest of all.
    pooling, normalize: see `BertForSentenceEmbedding`.
    """

    name = "embedding"
    head = BertForSentenceEmbedding
    answers = ()
    dtype = torch.float32

    loss: str = "cosine"
    scale: float = 5.0
    positive: float = 4.0
    temperature: float = 0.05
    pooling: str = "mean"
    normalize: bool = False
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        one_of("loss", self.loss, PAIR_LOSSES)
        one_of("pooling", self.pooling, POOLINGS)
        for name in ("scale", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")

    @property
    def metric(self):
        return "spearman" if self.loss == "cosine" else "nearest"

    @property
    def together(self):
        return 2

    def example(self, record: Record) -> Example:
        reader = Regression(text_column=self.text_column, pair_column=self.pair_column, label_column=self.label_column)
        example = reader.example(record)
        if len(example.texts) == 2 and example.target is None and self.loss == "contrastive":
            return Example(example.texts, self.positive, record.where)
        self.label(example)
        return example

    def fields(self, *texts):
        return pair_fields(texts, self.text_column, self.pair_column)

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        for example in examples:
            self.check(example, None)
        if all(self.label(example) is None for example in examples):
            raise ValueError(f"{examples[0].where}: no label from here on is positive={self.positive:g} or more")
        return ("vector",)

    def check(self, example, config):
        if len(example.texts) == 1:
            raise ValueError(
                f"{example.where}: one text: vectors are learned from pairs: name the second, --pair-column"
            )

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        limit = self.limit(config)
        sides = [(number, side) for number, example in enumerate(examples) for side in range(len(example.texts))]
        texts = [examples[number].texts[side] for number, side in sides]
        encoded = tokenizer(texts, truncation=self.truncate, max_length=limit if self.truncate else None)
        rows = []
        for (number, side), ids, types in zip(sides, encoded.input_ids, encoded.token_type_ids, strict=True):
            label = None if side else self.label(examples[number])  # the first text stands for the pair
            check_length(len(ids), limit, examples[number])
            rows.append(Row(ids, types, label=label, example=number))
        return rows

    def label(self, example: Example) -> float | None:
        if example.target is None:
            return None
        if self.loss == "contrastive":
            return 1.0 if example.target >= self.positive else None
        if not 0 <= example.target <= self.scale:
            raise ValueError(f"{example.where}: label={example.target:g} is not from 0 to scale={self.scale:g}")
        return example.target / self.scale

    def scores(self, output, rows):
        return list(as_numpy(output.sentence_embedding))

    def predict(self, examples, rows, scores, config):
        at = 0
        for example in examples:
            vectors, at = scores[at : at + len(example.texts)], at + len(example.texts)
            if len(vectors) == 1:
                yield texts_of(example) | {"embedding": vectors[0].tolist()}
            else:
                yield texts_of(example) | {"similarity": cosine(*vectors), "vectors": np.stack(vectors)}

    def measure(self, examples, predictions, config):
        targets, given = [example.target for example in examples], [p["similarity"] for p in predictions]
        result = {}
        if len(set(targets)) > 1:
            result |= {"pearson": metrics.pearson(targets, given), "spearman": metrics.spearman(targets, given)}
        if self.loss == "contrastive":
            same = [p["vectors"] for p, target in zip(predictions, targets, strict=True) if target >= self.positive]
            result["nearest"] = nearest(np.array(same)) if same else float("nan")
        return result

    def line(self, prediction):
        if "similarity" in prediction:
            return f"{prediction['similarity']:.4f}\t{read_again(prediction)}"
        return f"{' '.join(f'{x:.4f}' for x in prediction['embedding'])}\t{prediction['text']}"

    def mistake(self, example, prediction, config):
        right = self.label(example)  # None: nothing is learned of the pair, nor asked
        return None if right is None else distance(prediction["similarity"], right, prediction)


def nearest(pairs: np.ndarray) -> float:
    """Of pairs of vectors [P, 2, D], the share whose second is the nearest to the first, by cosine, of all seconds;
    one of k that are equally near counts 1 / k."""
    first, second = (pairs / np.maximum(np.linalg.norm(pairs, axis=-1, keepdims=True), 1e-12)).swapaxes(0, 1)
    right = 0.0
    for start in range(0, len(pairs), NEAREST):
        scores = first[start : start + NEAREST] @ second.T
        best = scores >= scores.max(1, keepdims=True)
        right += float((best.diagonal(start) / best.sum(1)).sum())
    return right / len(pairs)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0
