"""Multiple choice: which of several texts goes with a first one, as in SWAG and RACE."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import BertConfig
from ..data.records import Record, text_of, texts_in
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForMultipleChoice
from . import metrics
from .base import Example, Task
from .labels import check_length, softmax


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """One score a choice, and the softmax of the scores; accuracy.

    A record has `question`, perhaps a `context` before it, `choices`, a list, and `label`, the number of the right one
    (from 0). All questions have as many choices. Those of one context are not split up.
    """

    name = "choice"
    head = BertForMultipleChoice
    metric = "accuracy"

    num_choices: int = 0

    @property
    def together(self):
        return max(1, self.num_choices)

    def example(self, record: Record) -> Example:
        question, choices = text_of(record, "question"), texts_in(record, "choices", least=2)
        context = text_of(record, "context") if "context" in record.fields else None
        if context is not None:
            question = f"{context} {question}"
        label = record.fields.get("label")
        if label is not None and (type(label) is not int or not 0 <= label < len(choices)):
            raise ValueError(f"{record.where}: label={label!r} is not the number of a choice, 0 to {len(choices) - 1}")
        example = Example((question, *choices), label, record.where, context)
        self.check(example, None)
        return example

    def check(self, example, config):
        count = len(example.texts) - 1
        if self.num_choices and count != self.num_choices:
            raise ValueError(f"{example.where}: choices has {count} texts, expected {self.num_choices}")

    def fields(self, *texts):
        return {"question": texts[0], "choices": texts[1:]}

    def config(self, examples: Sequence[Example]):
        count = len(examples[0].texts) - 1
        odd = next((example for example in examples if len(example.texts) - 1 != count), None)
        if odd is not None:
            raise ValueError(f"{odd.where}: choices has {len(odd.texts) - 1} texts, the first question {count}")
        return {"id2label": ("score",), **dataclasses.replace(self, num_choices=count).kept()}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        limit, rows = self.limit(config), []
        pairs = [(number, choice) for number, example in enumerate(examples) for choice in range(1, len(example.texts))]
        questions, choices = [examples[n].texts[0] for n, _ in pairs], [examples[n].texts[i] for n, i in pairs]
        encoded = tokenizer(questions, choices, truncation=self.truncate, max_length=limit if self.truncate else None)
        for (number, choice), ids, types in zip(pairs, encoded.input_ids, encoded.token_type_ids, strict=True):
            example = examples[number]
            label = example.target if choice == 1 else None  # the first choice stands for its question
            check_length(len(ids), limit, example)
            rows.append(Row(ids, types, label=label, example=number))
        return rows

    def scores(self, output, rows):
        return list(output.logits.float().flatten().cpu().numpy())

    def predict(self, examples, rows, scores, config):
        at = 0
        for example in examples:
            question, *choices = example.texts
            logits, at = scores[at : at + len(choices)], at + len(choices)
            shares = softmax(np.array(logits))
            best = int(shares.argmax())
            answer = {"label": best, "choice": choices[best], "probability": float(shares[best])}
            yield {"question": question} | answer

    def measure(self, examples, predictions, config):
        targets = [example.target for example in examples]
        return {"accuracy": metrics.accuracy(targets, [p["label"] for p in predictions])}

    def line(self, prediction):
        return f"{prediction['choice']} {prediction['probability']:.3f}\t{prediction['question']}"

    def mistake(self, example, prediction, config):
        found = super().mistake(example, prediction, config)
        return found and dataclasses.replace(found, said=prediction["choice"], right=example.texts[1 + example.target])
