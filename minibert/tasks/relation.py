"""The relation between two entities that a sentence marks, as SemEval-2010 task 8 (Hendrickx et al., 2010)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import BertConfig
from ..data.records import Record, label_of, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForRelationExtraction
from ..train import metrics
from .base import Example, Task
from .classification import class_of, label_names, softmax

MARKED = re.compile(r"(.*)<e1>(.*)</e1>(.*)<e2>(.*)</e2>(.*)", re.DOTALL)
FIRST, SECOND = "$", "#"  # stand around the entities: pieces that every vocabulary has


@dataclass(frozen=True, kw_only=True)
class Relation(Task):
    """The relation of `<e1>…</e1>` to `<e2>…</e2>`; macro-F1 over all relations but `other`.

    A label may end in a direction, `Cause-Effect(e2,e1)`; one that is wrong counts as an error, and the two directions
    are one relation in the mean: the official score. The head reads the signs that stand before the entities
    (Baldini Soares et al., 2019; Wu and He, 2019).
    """

    name = "relation"
    head = BertForRelationExtraction
    metric = "f1"

    other: str = "Other"

    def example(self, record: Record) -> Example:
        text = text_of(record, "text")
        match = MARKED.fullmatch(text)
        if match is None or not match[2].strip() or not match[4].strip() or len(re.findall(r"</?e[12]>", text)) != 4:
            raise ValueError(
                f"{record.where}: text={text[:60]!r} does not mark <e1>one entity</e1> and <e2>another</e2>"
            )
        target = label_of(record, "label") if "label" in record.fields else None
        return Example(match.groups(), target, record.where, extra={"text": text})

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return label_names([example.target for example in examples], examples[0].where)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        first, second = (tokenizer.convert_tokens_to_ids(sign) for sign in (FIRST, SECOND))
        pieces = iter(tokenizer.encode_plain([part for example in examples for part in example.texts]))
        limit, rows = self.limit(config), []
        for number, example in enumerate(examples):
            before, one, between, other, after = (next(pieces) for _ in range(5))
            ids = [tokenizer.cls_token_id, *before, first, *one, first, *between, second, *other, second]
            at = (1 + len(before), 4 + len(before) + len(one) + len(between) - 1)
            if len(ids) + len(after) + 1 > limit and not (self.truncate and len(ids) < limit):
                raise ValueError(
                    f"{example.where}: the text has {len(ids) + len(after) + 1} tokens, the model takes {limit}: "
                    "use --truncate, which cuts what follows the entities"
                )
            ids = [*ids, *after[: limit - len(ids) - 1], tokenizer.sep_token_id]
            label = None if example.target is None else class_of(example, example.target, config.label2id)
            rows.append(Row(ids, [0] * len(ids), at, label, example=number))
        return rows

    def predict(self, examples, rows, scores, config):
        for example, logits in zip(examples, scores, strict=True):
            best = int(logits.argmax())
            answer = {"label": config.id2label[best], "probability": float(softmax(logits)[best])}
            yield dict(example.extra) | {"e1": example.texts[1], "e2": example.texts[3]} | answer

    def measure(self, examples, predictions, config):
        targets, given = [example.target for example in examples], [p["label"] for p in predictions]
        known = config.label2id
        right = metrics.accuracy([known[name] for name in targets], [known[name] for name in given])
        return {"accuracy": right, **directed_f1(targets, given, self.other)}

    def line(self, prediction):
        return f"{prediction['label']} {prediction['probability']:.3f}\t{prediction['e1']} | {prediction['e2']}"


def directed_f1(targets: Sequence[str], given: Sequence[str], other: str) -> dict:
    """precision, recall, f1: plain means over the relations of `targets` and `given`, whatever their direction."""
    relation = lambda label: re.sub(r"\(e[12],e[12]\)$", "", label)  # noqa: E731
    there, found = Counter(map(relation, targets)), Counter(map(relation, given))
    hits = Counter(relation(one) for one, said in zip(targets, given, strict=True) if one == said)
    per_class = {
        name: {
            "precision": hits[name] / found[name] if found[name] else 0.0,
            "recall": hits[name] / there[name] if there[name] else 0.0,
            "f1": 2 * hits[name] / (found[name] + there[name]),
            "support": there[name],
        }
        for name in sorted(there | found)
        if name != other
    }
    words = ("precision", "recall", "f1")
    mean = {word: float(np.mean([row[word] for row in per_class.values()])) if per_class else 0.0 for word in words}
    return mean | {"per_class": per_class}
