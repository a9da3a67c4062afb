"""A tag for each word: named entities and slots, alone or with the intent of the sentence."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..config import BertConfig, one_of
from ..data.records import Record, label_of, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForJointClassification, BertForTokenClassification
from ..train.spans import SCHEMES, scheme_of, span_scores, spans
from .base import Example, Task, as_numpy, per_position
from .classification import class_of, label_names, softmax

WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """Entities or slots, as tags of words; F1 of the spans that are right from their first word to their last.

    A word's tag is read at its first piece. scheme: `iob1`, `iob2` or `iobes`; by default the one the tags are in.
    A text without words of its own is cut at blanks and punctuation.
    """

    name = "ner"
    head = BertForTokenClassification
    metric = "f1"

    scheme: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.scheme is not None:
            one_of("scheme", self.scheme, SCHEMES)

    def example(self, record: Record) -> Example:
        words = record.fields.get("tokens")
        if words is None:
            text = text_of(record, "text")
            found = [(match[0], match.span()) for match in WORDS.finditer(text)]
            return Example(
                tuple(w for w, _ in found), None, record.where, extra={"text": text, "at": [s for _, s in found]}
            )
        words, tags = words_of(record, "tokens"), words_of(record, "tags") if "tags" in record.fields else None
        if tags is not None and len(tags) != len(words):
            raise ValueError(f"{record.where}: {len(words)} tokens and {len(tags)} tags")
        ends = np.cumsum([len(word) + 1 for word in words])
        at = [(int(end) - 1 - len(word), int(end) - 1) for word, end in zip(words, ends, strict=True)]
        return Example(words, tags, record.where, extra={"text": " ".join(words), "at": at})

    def tags(self, example: Example) -> Sequence[str] | None:
        return example.target

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return label_names([tag for example in examples for tag in self.tags(example)], examples[0].where)

    def config(self, examples):
        return {"id2label": self.names(examples), **dataclasses.replace(self, **self.found(examples)).kept()}

    def found(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Options that the examples decide."""
        return {"scheme": self.scheme or scheme_of(self.names(examples))}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        pieces = iter(tokenizer.encode_plain([word for example in examples for word in example.texts]))
        rows = []
        for number, example in enumerate(examples):
            words = [next(pieces) or [tokenizer.unk_token_id] for _ in example.texts]
            starts = 1 + np.cumsum([0, *map(len, words)])
            limit = self.limit(config)
            if starts[-1] + 1 > limit and not self.truncate:
                raise ValueError(
                    f"{example.where}: the text has {starts[-1] + 1} tokens, the model takes {limit}: use --truncate"
                )
            kept = int((starts[1:] < limit).sum())
            ids = [tokenizer.cls_token_id, *(i for word in words[:kept] for i in word), tokenizer.sep_token_id]
            tags = self.tags(example)
            classes = () if tags is None else [class_of(example, tag, config.label2id) for tag in tags[:kept]]
            label = self.label(example)
            rows.append(Row(ids, [0] * len(ids), tuple(starts[:kept].tolist()), label, classes, number))
        return rows

    def label(self, example: Example) -> int | None:
        return None

    def parts(self, batch):
        return {"loss": int((batch.token_labels != IGNORE).sum())}

    def scores(self, output, rows):
        return per_position(output.logits, rows)

    def predict(self, examples, rows, scores, config):
        for example, logits in zip(examples, scores, strict=True):
            best = logits.argmax(-1)
            # words beyond what the model takes are outside of everything
            tags = [config.id2label[i] for i in best] + ["O"] * (len(example.texts) - len(best))
            sure = softmax(logits).max(-1) if len(best) else np.empty(0)
            text, at = example.extra["text"], example.extra["at"]
            entities = [
                {
                    "text": text[at[first][0] : at[last][1]], "label": kind, "start": at[first][0], "end": at[last][1],
                    "probability": float(sure[first : last + 1].min()),
                }
                for kind, first, last in spans(tags, self.scheme or "iob2")
            ]  # fmt: skip
            yield {"text": text, "tokens": list(example.texts), "tags": tags, "entities": entities}

    def measure(self, examples, predictions, config):
        targets, given = [self.tags(example) for example in examples], [p["tags"] for p in predictions]
        hits = [a == b for one, other in zip(targets, given, strict=True) for a, b in zip(one, other, strict=True)]
        return span_scores(targets, given, self.scheme or "iob2") | {"token_accuracy": float(np.mean(hits))}

    def line(self, prediction):
        found = ", ".join(f"{e['label']}: {e['text']} ({e['probability']:.3f})" for e in prediction["entities"])
        return f"{found or 'nothing'}\t{prediction['text']}"


@dataclass(frozen=True, kw_only=True)
class Joint(Tagging):
    """The intent of a sentence and its slots, learned together (Chen et al., 2019); besides F1 of the slots the
    accuracy of intents, and the share of sentences in which everything is right."""

    name = "joint"
    head = BertForJointClassification
    metric = "exact"

    intents: Sequence[str] = ()

    def example(self, record):
        example = super().example(record)
        if "label" not in record.fields:
            return dataclasses.replace(example, target=None)
        return dataclasses.replace(example, target=(label_of(record, "label"), example.target))

    def tags(self, example):
        return None if example.target is None else example.target[1]

    def found(self, examples):
        intents = label_names([example.target[0] for example in examples], examples[0].where)
        return super().found(examples) | {"intents": intents}

    def label(self, example):
        if example.target is None:
            return None
        return class_of(example, example.target[0], {name: i for i, name in enumerate(self.intents)})

    def parts(self, batch):
        return {"sequence_loss": batch.num_sequences, "token_loss": int((batch.token_labels != IGNORE).sum())}

    def scores(self, output, rows):
        return list(zip(as_numpy(output.sequence_logits), per_position(output.logits, rows), strict=True))

    def predict(self, examples, rows, scores, config) -> Iterator[dict[str, Any]]:
        slots = super().predict(examples, rows, [slot for _, slot in scores], config)
        for (intent, _), answer in zip(scores, slots, strict=True):
            best = int(intent.argmax())
            yield {"label": self.intents[best], "probability": float(softmax(intent)[best])} | answer

    def measure(self, examples, predictions, config):
        pairs = list(zip(examples, predictions, strict=True))
        right = [example.target[0] == p["label"] for example, p in pairs]
        exact = [ok and list(self.tags(example)) == p["tags"] for ok, (example, p) in zip(right, pairs, strict=True)]
        shares = {"intent_accuracy": float(np.mean(right)), "exact": float(np.mean(exact))}
        return super().measure(examples, predictions, config) | shares

    def line(self, prediction):
        return f"{prediction['label']} {prediction['probability']:.3f}\t{super().line(prediction)}"


def words_of(record: Record, name: str) -> tuple[str, ...]:
    """A field that is a list of words, none of them empty."""
    value = record.fields.get(name)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(w, str) and w.strip() for w in value):
        raise ValueError(f"{record.where}: {name}={str(value)[:60]!r} is not a list of words")
    return tuple(value)
