"""Extractive question answering, as SQuAD 1.1 and 2.0: the span of a context that answers a question, or none."""

import collections
import dataclasses
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ..config import BertConfig
from ..data.records import SHOWN, Record, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForQuestionAnswering
from .base import Example, Mistake, Task, per_token
from .labels import marked

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Exact match and F1 of the answer (Rajpurkar et al., 2016 and 2018).

    A context that is too long is read in windows that begin `stride` tokens apart, or less where otherwise an answer of
    `max_answer` tokens might be in none of them whole; the answer is the best span of all, of so many tokens at most.
    Where there are questions without an answer, none is given if the score of [CLS] is above the best span's by more
    than `threshold`, which is chosen on the held-out questions. `truncate` cuts questions.
    """

    name = "qa"
    head = BertForQuestionAnswering
    metric = "f1"
    answers = ("answers",)

    max_length: int | None = 384
    stride: int = 128
    max_answer: int = 30
    may_be_none: bool = False
    threshold: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("stride", "max_answer"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number")

    def example(self, record: Record) -> Example:
        question, context = (text_of(record, name) for name in ("question", "context"))
        named = {"id": record.fields["id"]} if "id" in record.fields else {}
        # an article's questions share its words: they stay on one side of a split
        group = str(record.fields.get("title") or context)
        return Example((question, context), answers_of(record, context), record.where, group, named)

    def fields(self, *texts):
        if len(texts) != 2 or not texts[1]:
            raise ValueError(f"{SHOWN.repr(texts[0])}: expected a question ||| the context to find its answer in")
        return dict(zip(("question", "context"), texts, strict=True))

    def config(self, examples):
        none = any(example.target == () for example in examples)
        return {"id2label": ("start", "end"), **dataclasses.replace(self, may_be_none=none).kept()}

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        limit, rows = self.limit(config), []
        questions = tokenizer.encode_plain([example.texts[0] for example in examples])
        texts = list(dict.fromkeys(example.texts[1] for example in examples))  # several questions share one
        contexts = {
            text: (ids, np.array(offsets).reshape(-1, 2))
            for text, (ids, offsets) in zip(texts, tokenizer.encode_with_offsets(texts), strict=True)
        }
        for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
            context, offsets = contexts[example.texts[1]]
            if not context:
                raise ValueError(f"{example.where}: context={SHOWN.repr(example.texts[1])} holds no words")
            if self.truncate:
                question = question[: max(0, limit - 3 - self.max_answer)]
            head, room = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id], limit - 3 - len(question)
            if room < min(self.max_answer, len(context)):
                raise ValueError(
                    f"{example.where}: the question has {len(question)} tokens, which leaves {max(0, room)} of {limit} "
                    f"for its context, fewer than max_answer={self.max_answer}: use --truncate"
                )
            answer = tokens_of(example.target or (), offsets)
            step = max(1, min(self.stride, room - self.max_answer + 1))
            for first in range(0, max(1, len(context) - room + step), step):
                window = context[first : first + room]
                ids = [*head, *window, tokenizer.sep_token_id]
                types = [0] * len(head) + [1] * (len(window) + 1)
                label = None if example.target is None else [0, 0]
                if answer and first <= answer[0] and answer[1] < first + len(window):
                    label = [len(head) - first + end for end in answer]
                extra = (len(head), offsets[first : first + room])
                rows.append(Row(ids, types, label=label, example=number, extra=extra))
        return rows

    def scores(self, output, rows):
        return per_token(torch.stack([output.start_logits, output.end_logits], -1), rows)

    def predict(self, examples, rows, scores, config) -> Iterator[dict[str, Any]]:
        windows: dict[int, list[tuple[Row, np.ndarray]]] = collections.defaultdict(list)
        for row, score in zip(rows, scores, strict=True):
            windows[row.example].append((row, score))
        for number, example in enumerate(examples):
            question, context = example.texts
            best, start, end = max((self.best_span(*window) for window in windows[number]), key=lambda found: found[0])
            while end < len(context) and unicodedata.category(context[end])[0] == "M":
                end += 1  # an accent behind its letter is in no token of a vocabulary without accents
            answer = {"answer": context[start:end], "score": best, "start": start, "end": end}
            if self.may_be_none:
                none = min(float(score[0].sum()) for _, score in windows[number])
                answer |= {"span": context[start:end], "none": none}
                if none - best > self.threshold:
                    answer |= {"answer": "", "start": None, "end": None}
            yield {**example.extra, "question": question, **answer}

    def best_span(self, row: Row, score: np.ndarray) -> tuple[float, int, int]:
        """The highest sum of a first and a last token's score in a window, and the characters of that span."""
        before, offsets = row.extra
        start, end = score[before : before + len(offsets)].T
        width = min(self.max_answer, len(end))
        ends = np.concatenate([end, np.full(width - 1, -np.inf, end.dtype)])
        totals = start[:, None] + sliding_window_view(ends, width)  # [n, width]: from token i to i + j
        first, more = divmod(int(totals.argmax()), width)
        return float(totals[first, more]), int(offsets[first, 0]), int(offsets[first + more, 1])

    def fitted(self, examples, predictions, config):
        if not self.may_be_none:
            return self
        gaps = np.array([p["none"] - p["score"] for p in predictions])
        order = np.argsort(gaps, kind="stable")
        pairs = [(examples[i], predictions[i]["span"]) for i in order]
        silent = np.array([best_of(f1, "", example.target) for example, _ in pairs])
        said = np.array([best_of(f1, span, example.target) for example, span in pairs])
        gaps = gaps[order]
        # below each border between two gaps, and below and above all: those with a smaller gap answer
        total = silent.sum() + np.concatenate([[0.0], np.cumsum(said - silent)])
        borders = np.concatenate([gaps[:1] - 1, (gaps[:-1] + gaps[1:]) / 2, gaps[-1:] + 1])
        between = np.concatenate([[True], gaps[:-1] < gaps[1:], [True]])
        return dataclasses.replace(self, threshold=float(borders[np.where(between, total, -np.inf).argmax()]))

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

    def mistake(self, example, prediction, config):
        score, said, (question, context) = best_of(f1, prediction["answer"], example.target), "no answer", example.texts
        if score == 1:
            return None
        marks = [(start, start + len(text), "right") for text, start in dict.fromkeys(example.target)]
        if prediction["answer"]:
            said = prediction["answer"]
            marks.append((prediction["start"], prediction["end"], "said"))
        sure = prediction["score"]
        if self.may_be_none:  # as far as the choice between an answer and none was from the other
            sure = abs(prediction["none"] - sure - self.threshold)
        right = " / ".join(dict.fromkeys(text for text, _ in example.target)) or "no answer"
        parts = ((f"{question}\n", ""), *marked(context, marks))
        return Mistake((1 - score, sure), f"F1 {score:.3f}", said, right, parts)


def answers_of(record: Record, context: str) -> tuple[tuple[str, int], ...] | None:
    """(text, first character) of each answer, from a list of objects or from an object of lists; None if unlabelled.

    Raises:
        ValueError: they are something else, or one does not stand in the context where it says.
    """
    given = record.fields.get("answers")
    if given is None:
        return None
    try:
        columns = isinstance(given, dict)
        rows = zip(given["text"], given["answer_start"], strict=True) if columns else (
            (answer["text"], answer["answer_start"]) for answer in given
        )  # fmt: skip
        answers = tuple((text, whole(start)) for text, start in rows)
    except (KeyError, TypeError, ValueError, OverflowError):
        shown = SHOWN.repr(given)
        raise ValueError(f"{record.where}: answers={shown} has no text and answer_start for each") from None
    for text, start in answers:
        if not isinstance(text, str) or not text or start < 0 or not context.startswith(text, start):
            raise ValueError(f"{record.where}: answers: {SHOWN.repr(text)} does not stand at {start} of the context")
    return answers


def whole(value: Any) -> int:
    """A whole number, in whatever type a table holds it; ValueError, TypeError or OverflowError if it is none."""
    if int(value) != float(value):
        raise ValueError
    return int(value)


def tokens_of(answers: Sequence[tuple[str, int]], offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and last token of the first answer, None where there is none."""
    for text, start in answers[:1]:
        inside = np.flatnonzero((offsets[:, 0] < start + len(text)) & (offsets[:, 1] > start))
        if len(inside):
            return int(inside[0]), int(inside[-1])
    return None


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks, as SQuAD's scorer compares."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


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
