"""Extractive summarisation: which sentences of a document to keep (Liu and Lapata, 2019, without its extra layers)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..config import BertConfig
from ..data.records import Record, text_of, texts_in
from ..data.rows import Row
from ..data.sentences import split_sentences
from ..data.tokenizer import Tokenizer
from ..model import BertForTokenClassification
from .base import Example, Mistake, Task, per_position
from .labels import softmax

ROUGE = ("rouge1", "rouge2", "rougeL")
# the names that published sets give their columns, tried in this order
DOCUMENTS, SUMMARIES = ("document", "article", "text"), ("summary", "highlights")


@dataclass(frozen=True, kw_only=True)
class Summary(Task):
    """Keep `sentences` of a document; ROUGE against a summary that was written, beside the first sentences' (lead).

    Each sentence begins with a [CLS], whose state says whether to keep it. Learned are the sentences that a greedy
    search finds to be most like the summary (Nallapati et al., 2017). A sentence that shares three words in a row with
    one that is kept already is passed over (Paulus et al., 2018). Of a long document as many whole sentences are read,
    from the first, as the model takes.
    """

    name = "summary"
    head = BertForTokenClassification
    metric = "rouge1"
    answers = SUMMARIES
    classes = 2

    sentences: int = 3
    block_trigrams: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.sentences < 1:
            raise ValueError(f"sentences={self.sentences} is not positive")

    def example(self, record: Record) -> Example:
        if "sentences" in record.fields:
            sentences = texts_in(record, "sentences")
        else:
            document = text_of(record, usual(record, DOCUMENTS) or "text")
            sentences = tuple(s for line in document.splitlines() for s in split_sentences(line))
        summary = usual(record, SUMMARIES)
        target = None if summary is None else text_of(record, summary)
        extra = {"id": record.fields["id"]} if "id" in record.fields else {}
        return Example(sentences, target, record.where, extra=extra)

    def names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return ("leave", "keep")

    def config(self, examples: Sequence[Example]):
        rouge([""], [""])  # where its package is missing, that is said before anything is learned
        return super().config(examples)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], config: BertConfig) -> list[Row]:
        pieces = iter(tokenizer.encode_plain([s for example in examples for s in example.texts]))
        limit, rows = self.limit(config), []
        for number, example in enumerate(examples):
            ids, types, at = [], [], []
            sentences = [next(pieces) for _ in example.texts]
            if len(sentences[0]) + 2 > limit and not self.truncate:
                raise ValueError(
                    f"{example.where}: the first sentence has {len(sentences[0]) + 2} tokens, the model takes {limit}: "
                    "use --truncate"
                )
            for count, sentence in enumerate([sentences[0][: limit - 2], *sentences[1:]]):
                if len(ids) + len(sentence) + 2 > limit:
                    break
                at.append(len(ids))
                types += [min(count % 2, config.type_vocab_size - 1)] * (len(sentence) + 2)
                ids += [tokenizer.cls_token_id, *sentence, tokenizer.sep_token_id]
            kept = () if example.target is None else oracle(example.texts[: len(at)], example.target, self.sentences)
            tags = () if example.target is None else tuple(int(i in kept) for i in range(len(at)))
            rows.append(Row(ids, types, tuple(at), tags=tags, example=number))
        return rows

    def parts(self, batch):
        return {"loss": int((batch.token_labels != IGNORE).sum())}

    def scores(self, output, rows):
        return per_position(output.logits, rows)

    def predict(self, examples, rows, scores, config) -> Iterator[dict[str, Any]]:
        for example, logits in zip(examples, scores, strict=True):
            shares = softmax(logits)[:, 1]
            kept = choose(example.texts, np.argsort(-shares, kind="stable"), self.sentences, self.block_trigrams)
            text = " ".join(example.texts[i] for i in kept)
            yield dict(example.extra) | {"summary": text, "kept": kept, "probabilities": [float(p) for p in shares]}

    def measure(self, examples, predictions, config):
        ours = [p["summary"] for p in predictions]
        lead = [" ".join(example.texts[: self.sentences]) for example in examples]
        best = [
            " ".join(example.texts[i] for i in oracle(example.texts, example.target, self.sentences))
            for example in examples
        ]
        targets = [example.target for example in examples]
        return {
            f"{kind}{name}": value
            for kind, texts in (("", ours), ("lead_", lead), ("oracle_", best))
            for name, value in rouge(targets, texts).items()
        }

    def line(self, prediction):
        return prediction["summary"]

    def mistake(self, example, prediction, config):
        score = rouge([example.target], [prediction["summary"]])[self.metric]
        kept = prediction["kept"]
        parts = tuple((f"{sentence} ", "kept" if i in kept else "") for i, sentence in enumerate(example.texts))
        how = f"ROUGE-1 {score:.3f}"
        return Mistake((1 - score,), how, prediction["summary"], example.target, parts) if score < 1 else None


def usual(record: Record, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record.fields), None)


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def grams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def oracle(sentences: Sequence[str], summary: str, count: int) -> tuple[int, ...]:
    """The sentences, `count` at most, that are added one by one while the sum of F1 of words and pairs grows."""
    target = [grams(words(summary), n) for n in (1, 2)]
    parts = [[grams(words(sentence), n) for n in (1, 2)] for sentence in sentences]
    kept, sums, best = [], [Counter(), Counter()], 0.0
    while len(kept) < min(count, len(sentences)):
        tried = [
            (sum(_f1(total + part, goal) for total, part, goal in zip(sums, one, target, strict=True)), -i)
            for i, one in enumerate(parts)
            if i not in kept
        ]
        value, number = max(tried)
        if value <= best:
            break
        best, kept = value, [*kept, -number]
        sums = [total + part for total, part in zip(sums, parts[-number], strict=True)]
    return tuple(sorted(kept))


def _f1(ours: Counter, theirs: Counter) -> float:
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 0.0


def choose(sentences: Sequence[str], order: Sequence[int], count: int, block: bool) -> list[int]:
    """The first `count` in `order` that repeat no three words of one taken before; in the order of the document."""
    kept: list[int] = []
    seen: set = set()
    for i in map(int, order):
        own = set(grams(words(sentences[i]), 3))
        if len(kept) < count and not (block and own & seen):
            kept.append(i)
            seen |= own
    return sorted(kept)


def rouge(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L (Lin, 2004), with stemming, by the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs one more package: pip install 'minibert[tasks]'") from None
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    found = [scorer.score(target, text) for target, text in zip(targets, texts, strict=True)]
    return {name: float(np.mean([one[name].fmeasure for one in found])) for name in ROUGE}
