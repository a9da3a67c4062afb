"""Extractive question answering, as SQuAD 1.1 and 2.0: the span of a context that answers a question, or none."""

import collections
import dataclasses
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import BertConfig
from ..data.records import Record, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForQuestionAnswering
from .base import Example, Task, as_numpy

ARTICLES = re.compile(r"\b(a|an|the)\b")
BEST = 20  # first and last tokens that are tried with each other


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Exact match and F1 of the answer (Rajpurkar et al., 2016 and 2018).

    A context that is too long is read in windows, each `stride` tokens after the one before; the answer is the best
    span of all. max_answer: its tokens, at most. Where training has questions without an answer, none is given if the
    score of [CLS] is above the best span's by more than `threshold`, which is chosen on the held-out questions.
    """

    name = "qa"
    head = BertForQuestionAnswering
    metric = "f1"

    max_length: int | None = 384
    stride: int = 128
    max_answer: int = 30
    may_be_none: bool = False
    threshold: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("stride", "max_answer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")

    def example(self, record: Record) -> Example:
        texts, extra = tuple(text_of(record, name) for name in ("question", "context")), {}
        if "id" in record.fields:
            extra["id"] = record.fields["id"]
        given = record.fields.get("answers")
        answers = None if given is None else tuple((a["text"], a["answer_start"]) for a in given)
        for text, start in answers or ():
            if texts[1][start : start + len(text)] != text:
                raise ValueError(f"{record.where}: answers: {text[:40]!r} does not stand at {start} of the context")
        # an article's questions share its words: they stay on one side of a split
        return Example(texts, answers, record.where, group=record.fields.get("title"), extra=extra)

    def fields(self, *texts):
        if len(texts) != 2:
            raise ValueError(f"{self.name} reads a question and a context, got {len(texts)} texts")
        return dict(zip(("question", "context"), texts, strict=True))

    def config(self, examples):
        none = any(not example.target for example in examples)
        return {"id2label": ("start", "end"), **dataclasses.replace(self, may_be_none=none).kept()}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        questions = tokenizer.encode_plain([example.texts[0] for example in examples])
        contexts = tokenizer([e.texts[1] for e in examples], add_special_tokens=False, return_offsets_mapping=True)
        limit, rows = self.limit(config), []
        encoded = zip(examples, questions, contexts.input_ids, contexts.offset_mapping, strict=True)
        for number, (example, question, context, offsets) in enumerate(encoded):
            head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
            room = limit - len(head) - 1
            if room < min(self.stride, len(context)):
                raise ValueError(
                    f"{example.where}: the question has {len(question)} tokens, which leaves {max(room, 0)} of {limit} "
                    f"for the context: fewer than stride={self.stride}"
                )
            span = self._tokens_of_answer(example, offsets)
            for first in range(0, max(1, len(context) - room + self.stride), self.stride):
                window = context[first : first + room]
                ids = [*head, *window, tokenizer.sep_token_id]
                types = [0] * len(head) + [1] * (len(window) + 1)
                label = None
                if span is not None:
                    inside = first <= span[0] and span[1] < first + len(window)
                    label = [len(head) - first + end for end in span] if inside else [0, 0]
                rows.append(
                    Row(ids, types, label=label, example=number, extra=(len(head), offsets[first : first + room]))
                )
                if first + room >= len(context):
                    break
        return rows

    def _tokens_of_answer(self, example: Example, offsets) -> tuple[int, int] | None:
        """The first and last token of the first answer; (-1, -1), in no window, where there is none."""
        if example.target is None:
            return None
        if not example.target:
            return -1, -1
        text, start = example.target[0]
        inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(text) and b > start]
        return (inside[0], inside[-1]) if inside else (-1, -1)

    def scores(self, output, rows):
        ends = np.stack([as_numpy(output.start_logits), as_numpy(output.end_logits)], -1)
        return np.split(ends, np.cumsum([len(row.ids) for row in rows])[:-1])

    def predict(self, examples, rows, scores, config) -> Iterator[dict[str, Any]]:
        windows: dict[int, list[tuple[Row, np.ndarray]]] = collections.defaultdict(list)
        for row, score in zip(rows, scores, strict=True):
            windows[row.example].append((row, score))
        for number, example in enumerate(examples):
            question, context = example.texts
            found = [self._best_span(row, score) for row, score in windows[number]]
            best, start, end = max(found)
            none = min(float(score[0].sum()) for _, score in windows[number])
            answer = context[start:end]
            if self.may_be_none and none - best > self.threshold:
                answer = ""
            place = {"start": start, "end": end} if answer else {}
            yield dict(example.extra) | {"question": question, "answer": answer, "score": best, **place,
                                         "none": none, "span": context[start:end]}  # fmt: skip

    def _best_span(self, row: Row, score: np.ndarray) -> tuple[float, int, int]:
        """Score, and first and last character, of a window's best span."""
        before, offsets = row.extra
        body = score[before : before + len(offsets)]
        if not len(body):
            return -np.inf, 0, 0
        firsts, lasts = (np.argsort(-body[:, end], kind="stable")[:BEST] for end in (0, 1))
        pairs = [(i, j) for i in firsts for j in lasts if i <= j < i + self.max_answer] or [(firsts[0], firsts[0])]
        i, j = max(pairs, key=lambda pair: body[pair[0], 0] + body[pair[1], 1])
        return float(body[i, 0] + body[j, 1]), offsets[i][0], offsets[j][1]

    def fitted(self, examples, predictions, config):
        if not self.may_be_none:
            return self
        gaps = np.array([p["none"] - p["score"] for p in predictions])
        said = np.array(
            [best_of(f1, p["span"], example.target) for example, p in zip(examples, predictions, strict=True)]
        )
        silent = np.array([float(not example.target) for example in examples])
        # at a threshold t, those with a gap up to t answer
        order = np.argsort(gaps, kind="stable")
        total = np.concatenate([[silent.sum()], silent.sum() + np.cumsum((said - silent)[order])])
        cut = int(total.argmax())
        threshold = float(gaps[order[cut - 1]]) if cut else float(gaps.min()) - 1.0
        return dataclasses.replace(self, threshold=threshold)

    def measure(self, examples, predictions, config):
        pairs = [(p["answer"], example.target) for example, p in zip(examples, predictions, strict=True)]
        result = {
            "exact_match": float(np.mean([best_of(exact, *pair) for pair in pairs])),
            "f1": float(np.mean([best_of(f1, *pair) for pair in pairs])),
        }
        for name, kind in (("answered", True), ("unanswerable", False)):
            part = [best_of(f1, *pair) for pair in pairs if bool(pair[1]) == kind]
            if self.may_be_none and part:
                result[f"{name}_f1"] = float(np.mean(part))
        return result

    def line(self, prediction):
        return f"{prediction['answer'] or 'no answer'}\t{prediction['question']}"


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks, as SQuAD's scorer compares."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(ARTICLES.sub(" ", kept).split())


def exact(said: str, answer: str) -> float:
    return float(normal(said) == normal(answer))


def f1(said: str, answer: str) -> float:
    """F1 of the words they share; where one has none, whether both have none."""
    ours, theirs = normal(said).split(), normal(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def best_of(measure, said: str, answers: Sequence[tuple[str, int]]) -> float:
    """The best over all answers that were given; where there is none, to say nothing is right."""
    texts = [text for text, _ in answers if normal(text)] or [""]
    return max(measure(said, text) for text in texts)
