"""Texts and pairs of texts: one class, several labels, an intent or none of those known, a number."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..config import BertConfig, one_of
from ..data.records import Record, label_of, text_of
from ..data.rows import Row
from ..data.text import unknown_column
from ..data.tokenizer import Tokenizer
from ..model import BertForSequenceClassification
from . import metrics
from .base import Example, Mistake, Task, Verdict
from .labels import (
    NOTHING,
    check_length,
    class_of,
    distance,
    label_names,
    pair_fields,
    read_again,
    softmax,
    texts_of,
)

# the names that published sets give their columns, tried in this order
TEXTS = (("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("sentence",))
LABELS = ("label", "labels", "gold_label", "category", "intent", "score")
# options that need one class of several, or classes at all
SENSELESS = {
    "multi_label_classification": ("calibrate",),
    "regression": ("class_weights", "label_smoothing", "calibrate"),
}


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class of a text or a pair; accuracy, precision, recall, F1 and Matthews' correlation.

    text_column, pair_column, label_column: of the file; by default the first usual names that it has. An empty
        label_column leaves labels unread.
    texts: how many a model reads, 1 or 2, known from what it learned; 0 for either.
    class_weights: how much an example counts in the loss, by label; "balanced" for as much in all of a label's examples
        together as in those of any other. label_smoothing: the share of a label that is spread over all classes.
    calibrate: divide scores by a temperature that makes the held-out examples likeliest (Guo et al., 2017); `ece` and
        `brier` say how far probabilities are from what is right, `ece_before` and `brier_before` how far they were.
    """

    name = "classification"
    head = BertForSequenceClassification
    metric = "accuracy"
    answers = ()  # the column is found by its name, or not looked for
    problem: ClassVar[str] = "single_label_classification"
    label_first: ClassVar[str] = "label"  # the usual name that is looked for before the others

    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    texts: int = 0
    class_weights: str | Mapping[str, float] | None = None
    label_smoothing: float = 0.0
    calibrate: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        weights = self.class_weights
        if weights not in (None, "balanced") and not (
            isinstance(weights, Mapping) and all(isinstance(w, int | float) and w > 0 for w in weights.values())
        ):
            raise ValueError(
                f"class_weights={weights!r} is neither 'balanced' nor a positive number for each label, a dictionary "
                "in Python"
            )
        if not isinstance(self.label_smoothing, int | float) or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r} is not in [0, 1)")
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} is not a positive number")
        for name in SENSELESS.get(self.problem, ()):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} makes no sense for {self.name}: leave it out")

    def example(self, record: Record) -> Example:
        names = self.text_names(record)
        label = self.label_column
        if label is None:
            label = next((name for name in (self.label_first, *LABELS) if name in record.fields), None)
        target = self.target(record, label) if label else None
        example = Example(tuple(text_of(record, name) for name in names), target, record.where)
        self.check_texts(example)
        return example

    def check_texts(self, example: Example) -> None:
        """Refuse a text alone where the model reads pairs, and the reverse."""
        if self.texts and len(example.texts) != self.texts:
            kinds = ("a pair", "single texts") if self.texts == 1 else ("a text alone", "pairs")
            raise ValueError(f"{example.where}: {kinds[0]}, the model reads {kinds[1]}")

    def fields(self, *texts):
        return pair_fields(texts, self.text_column, self.pair_column)

    def text_names(self, record: Record) -> tuple[str, ...]:
        if self.text_column is not None:
            return (self.text_column,) if self.pair_column is None else (self.text_column, self.pair_column)
        usual = next((names for names in TEXTS if all(name in record.fields for name in names)), None)
        if usual is None:
            known = ", ".join(map(str, record.fields))
            raise ValueError(f"{record.where}: its columns are {known}: name the text with --text-column")
        return usual if self.pair_column is None else (usual[0], self.pair_column)

    def target(self, record: Record, name: str) -> Any:
        return label_of(record, name)

    def taught(self, example: Example) -> Sequence[str]:
        """The labels that an example teaches."""
        return (example.target,)

    def prepared(self, examples):
        if self.class_weights != "balanced":
            return self
        return dataclasses.replace(self, class_weights=self.balanced(examples))

    def balanced(self, examples: Sequence[Example]) -> dict[str, float]:
        """Weights with which every label counts the same, and the mean over the examples is 1."""
        counts = Counter(label for example in examples for label in self.taught(example))
        return {name: counts.total() / (len(counts) * count) for name, count in sorted(counts.items())}

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return label_names((label for example in examples for label in self.taught(example)), examples[0].where)

    def config(self, examples: Sequence[Example]) -> dict[str, Any]:
        made = {"id2label": self.names(examples), **dataclasses.replace(self, texts=len(examples[0].texts)).kept()}
        for name in self.class_weights or ():
            one_of("class_weights", name, made["id2label"])
        return {**made, "problem_type": self.problem}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        limit = self.limit(config)
        odd = next((example for example in examples if len(example.texts) != len(examples[0].texts)), None)
        if odd is not None:
            raise ValueError(f"{odd.where}: {len(odd.texts)} texts, {examples[0].where} has {len(examples[0].texts)}")
        texts = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
        encoded = tokenizer(*texts, truncation=self.truncate, max_length=limit if self.truncate else None)
        known, rows = config.label2id, []
        for number, example in enumerate(examples):
            ids, types = encoded.input_ids[number], encoded.token_type_ids[number]
            check_length(len(ids), limit, example)
            rows.append(Row(ids, types, label=self.label(example, known), example=number))
        return rows

    def label(self, example: Example, known: Mapping[str, int]) -> Any:
        """What the head learns from an example."""
        if example.target is None:
            return None
        return class_of(example, example.target, known, self.label_column or "label")

    def check(self, example, config):
        self.check_texts(example)
        self.label(example, config.label2id)

    def predict(self, examples, rows, scores, config):
        for example, logits in zip(examples, scores, strict=True):
            shares = softmax(logits / self.temperature)
            best = int(logits.argmax())
            answer = {"label": config.id2label[best], "probability": float(shares[best])}
            yield texts_of(example) | answer | {"logits": logits}

    def measure(self, examples, predictions, config):
        known = config.label2id
        targets = [known[example.target] for example in examples]
        result = metrics.classification(targets, [known[p["label"]] for p in predictions], config.id2label)
        return result | (self.calibration(targets, predictions) if self.calibrate else {})

    def calibration(self, targets: Sequence[int], predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """How far probabilities are from what is right, with the temperature and before."""
        logits = np.stack([p["logits"] for p in predictions])
        after, before = softmax(logits / self.temperature), softmax(logits)
        return {
            "temperature": self.temperature,
            "ece": metrics.ece(targets, after),
            "ece_before": metrics.ece(targets, before),
            "brier": metrics.brier(targets, after),
            "brier_before": metrics.brier(targets, before),
        }

    def fitted(self, examples, predictions, config):
        if not self.calibrate:
            return self
        known = config.label2id
        pairs = [(p["logits"], known[e.target]) for e, p in zip(examples, predictions, strict=True) if self.taught(e)]
        logits, labels = zip(*pairs, strict=True)
        return dataclasses.replace(self, temperature=metrics.temperature(labels, np.stack(logits)))

    def line(self, prediction):
        return f"{prediction['label']} {prediction['probability']:.3f}\t{read_again(prediction)}"


@dataclass(frozen=True, kw_only=True)
class Intent(Classification):
    """An intent, or none of those known: examples labelled `out_of_scope` are no class, and none is learned from them.

    A text is out of scope where its largest probability is below `threshold`, which is chosen on the held-out examples
    for the best accuracy on both together, if there are any of them (Larson et al., 2019).
    """

    name = "intent"
    label_first = "intent"

    out_of_scope: str = "oos"
    threshold: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "out_of_scope", str(self.out_of_scope))  # labels are texts, also a -1

    def taught(self, example):
        return () if example.target == self.out_of_scope else super().taught(example)

    def label(self, example, known):
        return None if example.target == self.out_of_scope else super().label(example, known)

    def predict(self, examples, rows, scores, config):
        for answer in super().predict(examples, rows, scores, config):
            known = answer["probability"] >= self.threshold
            yield answer if known else answer | {"label": self.out_of_scope}

    def fitted(self, examples, predictions, config):
        task = super().fitted(examples, predictions, config)
        inside = np.array([example.target != self.out_of_scope for example in examples])
        if inside.all():
            return task
        best = [config.id2label[int(p["logits"].argmax())] for p in predictions]
        right = np.array([b == example.target for b, example in zip(best, examples, strict=True)])
        sure = [softmax(p["logits"] / task.temperature).max() for p in predictions]
        sure, group = np.unique(sure, return_inverse=True)
        # kept from each probability on: what is right counts, and what is out of scope would be right if left out
        gain = np.bincount(group, np.where(inside, right, -1.0))[::-1].cumsum()[::-1]
        between = (sure[1:] + sure[:-1]) / 2  # where a probability that is computed again may differ a little
        thresholds = np.concatenate([[0.0], between, [np.nextafter(sure[-1], 2)]])
        return dataclasses.replace(task, threshold=float(thresholds[np.append(gain, 0.0).argmax()]))

    def measure(self, examples, predictions, config):
        inside = [i for i, example in enumerate(examples) if example.target != self.out_of_scope]
        if not inside:
            raise ValueError(f"{examples[0].where}: all are {self.out_of_scope!r}: some known intent is needed")
        closed = [p | {"label": config.id2label[int(p["logits"].argmax())]} for p in predictions]
        result = super().measure([examples[i] for i in inside], [closed[i] for i in inside], config)
        if len(inside) < len(examples):
            outside = np.array([example.target == self.out_of_scope for example in examples])
            said = np.array([p["label"] == self.out_of_scope for p in predictions])
            sure = np.array([p["probability"] for p in predictions])
            result |= {
                "threshold": self.threshold,
                "in_scope_kept": float(1 - said[~outside].mean()),
                "out_of_scope_recall": float(said[outside].mean()),
                "out_of_scope_auroc": metrics.auroc(outside, -sure),
            }
        return result

    def verdicts(self, example, prediction, config):
        [one] = super().verdicts(example, prediction, config)
        # its probability is that of the intent that was not said
        return [one._replace(probability=None) if one.said == self.out_of_scope else one]


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Classification):
    """Any number of labels of a text, a list in jsonl or names between `separator`; F1 over all (micro) and macro.

    A label is given where its probability is `threshold` or more.
    """

    name = "multilabel"
    metric = "f1"
    problem = "multi_label_classification"
    label_first = "labels"
    dtype = torch.float32

    separator: str = "|"
    threshold: float = 0.5

    def target(self, record, name):
        if name not in record.fields:
            raise unknown_column(record.where, name, record.fields)
        value = record.fields[name]
        if isinstance(value, str):
            value = [part for part in value.split(self.separator) if part.strip()]
        if not isinstance(value, list):
            raise ValueError(f"{record.where}: {name}={value!r} is not a list of labels")
        return tuple(label_of(Record(record.where, {name: label}, record.kinds), name) for label in value)

    def taught(self, example):
        return example.target

    def balanced(self, examples):
        """Weights with which having a label counts as much as not having it."""
        counts = Counter(label for example in examples for label in self.taught(example))
        return {
            name: (len(examples) - count) / count for name, count in sorted(counts.items()) if count < len(examples)
        }

    def label(self, example, known):
        if example.target is None:
            return None
        given = {class_of(example, label, known, self.label_column or "labels") for label in example.target}
        return [float(i in given) for i in range(len(known))]

    def predict(self, examples, rows, scores, config):
        for example, logits in zip(examples, scores, strict=True):
            each = 1 / (1 + np.exp(-logits.astype(np.float64)))
            shares = {name: float(p) for name, p in zip(config.id2label, each, strict=True)}
            labels = [name for name, p in shares.items() if p >= self.threshold]
            yield texts_of(example) | {"labels": labels, "probabilities": shares, "logits": logits}

    def measure(self, examples, predictions, config):
        known = config.label2id
        targets = np.array([self.label(example, known) for example in examples])
        given = np.array([[name in p["labels"] for name in config.id2label] for p in predictions])
        return metrics.multi_label(targets, given, config.id2label)

    def line(self, prediction):
        shares = prediction["probabilities"]
        labels = ", ".join(f"{name} {shares[name]:.3f}" for name in prediction["labels"]) or "none"
        return f"{labels}\t{read_again(prediction)}"

    def verdicts(self, example, prediction, config):
        right, said, shares = set(example.target), set(prediction["labels"]), prediction["probabilities"]
        sides = [
            [name if name in part else NOTHING for part in (right, said)] for name in shares if name in right | said
        ]
        return [Verdict(a, b, shares.get(b)) for a, b in sides]

    def mistake(self, example, prediction, config):
        right, said, shares = set(example.target), set(prediction["labels"]), prediction["probabilities"]
        if right == said:
            return None
        sure = max(shares[name] if name in said else 1 - shares[name] for name in right ^ said)
        labels = ", ".join(f"{name} {shares[name]:.3f}" for name in prediction["labels"]) or "none"
        parts = ((read_again(prediction), ""),)
        return Mistake((sure,), f"{sure:.3f}", labels, ", ".join(example.target) or "none", parts)


@dataclass(frozen=True, kw_only=True)
class Regression(Classification):
    """A number for a text or a pair, as similarity; Pearson's and Spearman's correlation."""

    name = "regression"
    metric = "pearson"
    problem = "regression"
    label_first = "score"
    dtype = torch.float32

    def target(self, record, name):
        value = label_of(dataclasses.replace(record, kinds={}), name)  # 3 and 3.0 are one number
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not np.isfinite(number):
            raise ValueError(f"{record.where}: {name}={value!r} is not a number, which regression needs")
        return number

    def names(self, examples):
        return ("value",)

    def label(self, example, known):
        return example.target

    def predict(self, examples, rows, scores, config):
        for example, value in zip(examples, scores, strict=True):
            yield texts_of(example) | {"value": float(value[0])}

    def measure(self, examples, predictions, config):
        return metrics.regression([example.target for example in examples], [p["value"] for p in predictions])

    def line(self, prediction):
        return f"{prediction['value']:.4f}\t{read_again(prediction)}"

    def mistake(self, example, prediction, config):
        return distance(prediction["value"], example.target, prediction)
