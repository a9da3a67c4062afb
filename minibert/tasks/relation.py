"""The relation between two entities that a sentence marks, as SemEval-2010 task 8 (Hendrickx et al., 2010)."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import BertConfig
from ..data.formats.semeval import MARKERS
from ..data.records import SHOWN, Record, label_of, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForRelationExtraction
from .base import Example, Task
from .labels import check_length, class_of, label_names, softmax
from .spans import ratios

MARK = re.compile(r"</?e[12]>")
SIGNS = ("$", "#")  # stand around the first and the second entity: pieces that most vocabularies have


@dataclass(frozen=True, kw_only=True)
class Relation(Task):
    """The relation of `<e1>…</e1>` to `<e2>…</e2>`; macro-F1 over all relations but `other`.

    A label may end in a direction, `Cause-Effect(e2,e1)`; one that is wrong counts as an error, and the two directions
    are one relation in the mean: the official score. The head reads the signs that stand before the entities, that of
    e1 first wherever it stands (Baldini Soares et al., 2019; Wu and He, 2019).
    """

    name = "relation"
    head = BertForRelationExtraction
    metric = "f1"

    other: str = "Other"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "other", str(self.other))  # labels are texts, also a 0

    def example(self, record: Record) -> Example:
        text = text_of(record, "text")
        parts = tuple(MARK.split(text))
        if MARK.findall(text) not in MARKERS or not parts[1].strip() or not parts[3].strip():
            raise ValueError(
                f"{record.where}: text={SHOWN.repr(text)} does not mark <e1>one entity</e1> and <e2>another</e2>"
            )
        target = label_of(record, "label") if "label" in record.fields else None
        named = {"id": record.fields["id"]} if "id" in record.fields else {}
        return Example(parts, target, record.where, extra={**named, "text": text})

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return label_names([example.target for example in examples], examples[0].where)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        signs = tokenizer.convert_tokens_to_ids(SIGNS)
        pieces = iter(tokenizer.encode_plain([part for example in examples for part in example.texts]))
        limit, rows = self.limit(config), []
        for number, example in enumerate(examples):
            before, one, between, other, after = (next(pieces) for _ in range(5))
            turn = -1 if second_first(example) else 1
            a, b = signs[::turn]
            inner = [a, *one, a, *between, b, *other, b]
            length, spare = len(before) + len(inner) + len(after) + 2, limit - 2 - len(inner)
            if not self.truncate:
                check_length(length, limit, example)
            if spare < 0:
                raise ValueError(
                    f"{example.where}: the entities and what is between them have {len(inner)} tokens, "
                    f"the model takes {limit - 2}"
                )
            # what follows the entities is cut first, then the beginning
            after = after[: max(0, spare - len(before))]
            before = before[max(0, len(before) - spare) :]
            ids = [tokenizer.cls_token_id, *before, *inner, *after, tokenizer.sep_token_id]
            first = 1 + len(before)
            at = (first, first + 2 + len(one) + len(between))[::turn]
            rows.append(Row(ids, [0] * len(ids), at, self.label(example, config.label2id), example=number))
        return rows

    def label(self, example: Example, known: Mapping[str, int]) -> int | None:
        return None if example.target is None else class_of(example, example.target, known)

    def check(self, example, config):
        self.label(example, config.label2id)

    def predict(self, examples, rows, scores, config):
        for example, logits in zip(examples, scores, strict=True):
            best = int(logits.argmax())
            answer = {"label": config.id2label[best], "probability": float(softmax(logits)[best])}
            e1, e2 = example.texts[1::2][:: -1 if second_first(example) else 1]
            yield dict(example.extra) | {"e1": e1, "e2": e2} | answer

    def measure(self, examples, predictions, config):
        targets, given = [example.target for example in examples], [p["label"] for p in predictions]
        right = float(np.mean([one == said for one, said in zip(targets, given, strict=True)]))
        return {"accuracy": right, **directed_f1(targets, given, self.other)}

    def line(self, prediction):
        return f"{prediction['label']} {prediction['probability']:.3f}\t{prediction['e1']} | {prediction['e2']}"

    def mistake(self, example, prediction, config):
        found = super().mistake(example, prediction, config)
        first, second = ("e2", "e1") if second_first(example) else ("e1", "e2")
        parts = zip(example.texts, ("", first, "", second, ""), strict=True)
        return found and dataclasses.replace(found, parts=tuple(parts))


def second_first(example: Example) -> bool:
    """Whether `<e2>` comes before `<e1>`."""
    return "<e1>" not in example.extra["text"].partition("<e2>")[0]


def directed_f1(targets: Sequence[str], given: Sequence[str], other: str) -> dict:
    """precision, recall, f1: plain means over the relations that `targets` have, whatever their direction."""
    relation = lambda label: re.sub(r"\(e[12],e[12]\)$", "", label)  # noqa: E731
    there, found = Counter(map(relation, targets)), Counter(map(relation, given))
    hits = Counter(relation(one) for one, said in zip(targets, given, strict=True) if one == said)
    per_class = {
        name: ratios(hits[name], found[name], there[name]) | {"support": there[name]}
        for name in sorted(there)
        if name != other
    }
    words = ("precision", "recall", "f1")
    mean = {word: float(np.mean([row[word] for row in per_class.values()])) if per_class else 0.0 for word in words}
    return mean | {"per_class": per_class}
