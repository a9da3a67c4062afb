"""A tag for each word: named entities and slots, alone or with the intent of the sentence."""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..config import BertConfig, one_of
from ..data.records import NO_TEXT, SHOWN, Record, label_of, text_of
from ..data.rows import Row
from ..data.tokenizer import Tokenizer
from ..model import BertForJointClassification, BertForTokenClassification
from ..model.crf import begin_chain
from .base import Example, Mistake, Task, Verdict, as_numpy, per_position
from .labels import NOTHING, check_length, class_of, label_names, marked, softmax
from .spans import SCHEMES, is_tag, scheme_of, span_scores, spans

# a Chinese character; letters, also with ' or - between them; or a sign
WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:['’-][^\W\u3400-\u9fff]+)*|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """Entities or slots, as tags of words; F1 of the spans that are right from their first word to their last.

    A word's tag is read at its first piece. scheme: `iob1`, `iob2` or `iobes`; by default the one the tags are in.
    crf: learn, and find, the tags of a sentence together, see `minibert.model.crf`.
    A text without words of its own is cut at blanks and punctuation.
    """

    name = "ner"
    head = BertForTokenClassification
    metric = "f1"
    answers = ("tags",)

    scheme: str | None = None
    crf: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.scheme is not None:
            one_of("scheme", self.scheme, SCHEMES)

    def example(self, record: Record) -> Example:
        if not {"tokens", "tags"} & record.fields.keys():
            text = text_of(record, "text")
            at = places(text)
            return Example(tuple(text[a:b] for a, b in at), None, record.where, extra={"text": text, "at": at})
        words = words_of(record, "tokens")
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        at = [(end - len(word), end) for word, end in zip(words, ends.tolist(), strict=True)]
        tags = self.tags_of(record, len(words)) if "tags" in record.fields else None
        return Example(words, tags, record.where, extra={"text": " ".join(words), "at": at})

    def tags_of(self, record: Record, count: int) -> tuple[str, ...]:
        tags = words_of(record, "tags")
        if len(tags) != count:
            raise ValueError(f"{record.where}: {count} tokens and {len(tags)} tags")
        wrong = next((tag for tag in tags if not is_tag(tag, self.scheme)), None)
        if wrong is not None:
            marks = ", ".join(f"{mark}-…" for mark in SCHEMES[self.scheme or "iobes"])
            raise ValueError(f"{record.where}: tag {wrong!r} is not one of O, {marks}")
        return tags

    def tags(self, example: Example) -> Sequence[str] | None:
        return example.target

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return label_names((tag for example in examples for tag in self.tags(example)), examples[0].where)

    def config(self, examples):
        return {"id2label": self.names(examples), **dataclasses.replace(self, **self.found(examples)).kept()}

    def found(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Options that the examples decide."""
        return {"scheme": self.scheme or scheme_of(map(self.tags, examples))}

    def scheme_in(self, config: BertConfig) -> str:
        """The scheme of the model's tags; of a model from elsewhere, the one that their names are in."""
        return self.scheme or scheme_of([name] for name in config.id2label)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        pieces = iter(tokenizer.encode_plain([word for example in examples for word in example.texts]))
        limit, rows = self.limit(config), []
        for number, example in enumerate(examples):
            # a word of characters that are cleaned away still has its tag
            words = [next(pieces) or [tokenizer.unk_token_id] for _ in example.texts]
            firsts = np.cumsum([1, *map(len, words)])
            if not self.truncate:
                check_length(firsts[-1] + 1, limit, example)
            at = [first for first in firsts[:-1].tolist() if first < limit - 1]
            body = list(itertools.chain.from_iterable(words))[: limit - 2]
            classes = self.tag_classes(example, config)[: len(at)]
            ids = [tokenizer.cls_token_id, *body, tokenizer.sep_token_id]
            rows.append(Row(ids, [0] * len(ids), at, self.label(example), classes, number))
        return rows

    def tag_classes(self, example: Example, config: BertConfig) -> list[int]:
        """The numbers of its tags, none where it has none."""
        known = config.label2id
        return [class_of(example, tag, known, "tags") for tag in self.tags(example) or ()]

    def label(self, example: Example) -> int | None:
        return None

    def check(self, example, config):
        self.label(example)
        self.tag_classes(example, config)

    def check_part(self, examples, config):
        """Refuse tags of another scheme than the model's, in which most of their spans would be others, or none."""
        found, due = scheme_of(self.tags(example) or () for example in examples), self.scheme_in(config)
        lost = kept = 0
        for tags in map(self.tags, examples if found != due else ()):
            there, same = {*spans(tags or (), found)}, {*spans(tags or (), due)}
            lost, kept = lost + len(there - same), kept + len(there & same)
        if lost > max(2, kept):  # a slip or two are left out by a scorer
            where, schemes = examples[0].where, f"in {found}, the model's in {due}"
            raise ValueError(f"{where}: tags from here on are {schemes}: convert them")

    def initialise(self, model, rows):
        if "crf.transitions" in model.new_parameters:
            begin_chain(model.crf, (row.tags for row in rows))

    def parts(self, batch):
        return {"loss": int((batch.token_labels != IGNORE).sum())}

    def scores(self, output, rows):
        """Logits [words, L], or the tags that a CRF found and their probabilities, each [words]."""
        if output.tags is None:
            return per_position(output.logits, rows)
        tags, sure = per_position(output.tags, rows), per_position(output.tag_probabilities, rows)
        return [(one.astype(int), other) for one, other in zip(tags, sure, strict=True)]

    def predict(self, examples, rows, scores, config):
        for example, one in zip(examples, scores, strict=True):
            classes, sure = one if isinstance(one, tuple) else (one.argmax(-1), softmax(one).max(-1))
            # words beyond what the model takes are outside of everything
            tags = [config.id2label[i] for i in classes] + ["O"] * (len(example.texts) - len(classes))
            text, at = example.extra["text"], example.extra["at"]
            entities = [
                {
                    "text": text[at[first][0] : at[last][1]], "label": kind, "start": at[first][0], "end": at[last][1],
                    "probability": float(sure[first : last + 1].min()),
                }
                for kind, first, last in spans(tags, self.scheme_in(config))
            ]  # fmt: skip
            yield {"text": text, "tokens": list(example.texts), "tags": tags, "entities": entities, "sure": sure}

    def measure(self, examples, predictions, config):
        self.check_part(examples, config)
        targets, given = [self.tags(example) for example in examples], [p["tags"] for p in predictions]
        hits = [a == b for one, other in zip(targets, given, strict=True) for a, b in zip(one, other, strict=True)]
        return span_scores(targets, given, self.scheme_in(config)) | {"token_accuracy": float(np.mean(hits))}

    def line(self, prediction):
        found = ", ".join(f"{e['label']}: {e['text']} ({e['probability']:.3f})" for e in prediction["entities"])
        return f"{found or 'nothing'}\t{prediction['text']}"

    def sides(self, example: Example, prediction: Mapping[str, Any], config: BertConfig) -> list[dict]:
        """The kinds of the spans that are right, and of those that were said, by their first and last word."""
        both, scheme = (self.tags(example), prediction["tags"]), self.scheme_in(config)
        return [{(first, last): kind for kind, first, last in spans(tags, scheme)} for tags in both]

    def verdicts(self, example, prediction, config):
        right, said = self.sides(example, prediction, config)
        sure = dict(zip(said, (entity["probability"] for entity in prediction["entities"]), strict=True))
        return [Verdict(right.get(at, NOTHING), said.get(at, NOTHING), sure.get(at)) for at in sorted(right | said)]

    def mistake(self, example, prediction, config):
        right, said = self.sides(example, prediction, config)
        wrong = {at: (said.get(at), right.get(at)) for at in sorted(right | said) if right.get(at) != said.get(at)}
        if not wrong:
            return None
        text, at = example.extra["text"], example.extra["at"]
        marks, listed = [], []
        for who, kinds in zip(("said", "right"), zip(*wrong.values(), strict=True), strict=True):
            found = [(at[a][0], at[b][1], kind) for (a, b), kind in zip(wrong, kinds, strict=True) if kind is not None]
            marks += [(start, end, f"{who} {kind}") for start, end, kind in found]
            listed.append(", ".join(f"{kind}: {text[start:end]}" for start, end, kind in found) or "nothing")
        # as sure as of the word that is wrong most surely; of those that were not read nothing is known
        words = zip(prediction["sure"], prediction["tags"], self.tags(example), strict=False)
        sure = max((float(p) for p, tag, target in words if tag != target), default=0.0)
        return Mistake((sure,), f"{sure:.3f}", *listed, marked(text, marks))


@dataclass(frozen=True, kw_only=True)
class Joint(Tagging):
    """The intent of a sentence and its slots, learned together (Chen et al., 2019); besides F1 of the slots the
    accuracy of intents, and the share of sentences in which everything is right."""

    name = "joint"
    head = BertForJointClassification
    metric = "exact"
    answers = ("tags", "label")

    intents: Sequence[str] = ()

    def example(self, record):
        example = super().example(record)
        if (example.target is None) != ("label" not in record.fields):
            missing = "tags" if example.target is None else "label"
            raise ValueError(f"{record.where}: it has no {missing}: joint learns a label and tags of each sentence")
        target = None if example.target is None else (label_of(record, "label"), example.target)
        return dataclasses.replace(example, target=target)

    def tags(self, example):
        return None if example.target is None else example.target[1]

    def found(self, examples):
        intents = label_names((example.target[0] for example in examples), examples[0].where)
        return super().found(examples) | {"intents": intents}

    def label(self, example):
        if example.target is None:
            return None
        return class_of(example, example.target[0], {name: i for i, name in enumerate(self.intents)})

    def parts(self, batch):
        return {"sequence_loss": batch.num_sequences, "token_loss": int((batch.token_labels != IGNORE).sum())}

    def scores(self, output, rows):
        return list(zip(as_numpy(output.sequence_logits), super().scores(output, rows), strict=True))

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

    def verdicts(self, example, prediction, config):
        return [Verdict(example.target[0], prediction["label"], prediction["probability"])]

    def mistake(self, example, prediction, config):
        slots, intent = super().mistake(example, prediction, config), Task.mistake(self, example, prediction, config)
        found = [one for one in (intent, slots) if one is not None]
        if not found:
            return None
        worst = max(found, key=lambda one: one.severity)
        said, right = ("; ".join(getattr(one, side) for one in found) for side in ("said", "right"))
        parts = slots.parts if slots else ((example.extra["text"], ""),)
        return dataclasses.replace(worst, said=said, right=right, parts=parts)


def places(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end."""
    # an accent that stands alone is no \w: here it goes on with the letter before it, as in Indian scripts
    letters = "".join("x" if unicodedata.category(c)[0] == "M" else c for c in text)
    return [match.span() for match in WORDS.finditer(letters)]


def words_of(record: Record, name: str) -> tuple[str, ...]:
    """A field that is a list of words, none of them empty."""
    value = record.fields.get(name)
    is_word = lambda word: isinstance(word, str) and word.strip() and not NO_TEXT.search(word)  # noqa: E731
    if not isinstance(value, list | tuple) or not value or not all(map(is_word, value)):
        raise ValueError(f"{record.where}: {name}={SHOWN.repr(value)} is not a list of words")
    return tuple(value)
