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
from ..train import metrics
from .base import Example, Task, as_numpy
from .classification import Regression, check_length, read_again, texts_of

LOSSES = ("cosine", "contrastive")


@dataclass(frozen=True, kw_only=True)
class Embedding(Task):
    """Vectors of pairs of texts; Pearson's and Spearman's correlation of their cosine with the label.

    loss: `cosine` learns labels from 0 to `scale`, as similarities; `contrastive` takes the pairs with a label of
    `positive` or more, or all that have none, for the same in other words, and the other texts of the batch for others
    (Henderson et al., 2017).
    pooling, normalize: see `BertForSentenceEmbedding`.
    """

    name = "embedding"
    head = BertForSentenceEmbedding
    metric = "spearman"
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
        one_of("loss", self.loss, LOSSES)
        for name in ("scale", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")

    @property
    def together(self):
        return 2

    def example(self, record: Record) -> Example:
        reader = Regression(text_column=self.text_column, pair_column=self.pair_column, label_column=self.label_column)
        example = reader.example(record)
        if len(example.texts) == 2 and example.target is None and self.loss == "contrastive":
            return Example(example.texts, self.positive, record.where)
        return example

    def fields(self, text):
        return {self.text_column or "text": text}

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        single = next((example for example in examples if len(example.texts) == 1), None)
        if single is not None:
            raise ValueError(
                f"{single.where}: one text: vectors are learned from pairs: name the second, --pair-column"
            )
        return ("vector",)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        limit = self.limit(config)
        texts = [(number, text) for number, example in enumerate(examples) for text in example.texts]
        encoded = tokenizer(
            [text for _, text in texts], truncation=self.truncate, max_length=limit if self.truncate else None
        )
        rows, seen = [], set()
        for (number, _), ids, types in zip(texts, encoded.input_ids, encoded.token_type_ids, strict=True):
            label = None if number in seen else self.label(examples[number])  # the first text stands for the pair
            seen.add(number)
            rows.append(Row(check_length(ids, limit, examples[number]), types, label=label, example=number))
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
            answer = {"embedding": [float(x) for x in vectors[0]]}
            if len(vectors) == 2:
                answer = {"similarity": cosine(*vectors)}
            yield texts_of(example) | answer

    def measure(self, examples, predictions, config):
        targets, given = [example.target for example in examples], [p["similarity"] for p in predictions]
        return {"pearson": metrics.pearson(targets, given), "spearman": metrics.spearman(targets, given)}

    def line(self, prediction):
        if "similarity" in prediction:
            return f"{prediction['similarity']:.4f}\t{read_again(prediction)}"
        return f"{' '.join(f'{x:.4f}' for x in prediction['embedding'])}\t{prediction['text']}"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0
