"""What a model says of one text, and why: an `Explanation`, and how it is made."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, pack
from ..config import one_of
from ..data.tokenizer import Encoding, Tokenizer
from ..model import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from ..model.heads import MLMHead
from ..tasks import task_of
from ..tasks.classification import MultiLabel, Regression
from .attribution import Score, class_score, integrated_gradients, token_score

BASELINES = ("mask", "pad")
Guess = tuple[str, float]  # a class or token, and its probability
Model = BertForSequenceClassification | BertForMaskedLM | BertForPreTraining


@dataclass(frozen=True)
class Word:
    """A word as the text has it, its pieces `start` to `stop` (exclusive), and what these add, summed."""

    text: str
    start: int
    stop: int
    attribution: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One text of S tokens (pieces), seen by a model of L layers and H heads.

    text, pair: as given; pair is None for a single text.
    tokens: S pieces. types: S integers, 1 for the pieces of the pair.
    offsets: S (start, end), where in its text a piece stands; (0, 0) for [CLS] and [SEP].
    predictions: the classes, or the first [MASK]'s likeliest tokens, likeliest first; empty for a regression.
    label: the class or token that is explained. position: of the [MASK] that is explained, None for a classifier.
    score, baseline_score: the label's logit (of a regression, the value) for the text, and for the text with the token
        `baseline` in place of every piece that is not [CLS], [SEP] or [MASK].
    attributions: S numbers, what each piece adds to the score; zero where text and baseline are the same.
    words: the same by word.
    attentions: [L, H, S, S] float32 on the host; a row is what a token looks at, and adds up to 1.
    guessed: P positions: of every [MASK], or of all tokens in a text without one; none without an MLM head.
    guesses: [L + 1][P] likeliest tokens, were the head to read the embeddings (0) or the output of a layer.
    """

    text: str
    pair: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    predictions: tuple[Guess, ...]
    label: str
    position: int | None
    baseline: str
    score: float
    baseline_score: float
    attributions: tuple[float, ...]
    words: tuple[Word, ...]
    attentions: Tensor
    guessed: tuple[int, ...]
    guesses: tuple[tuple[tuple[Guess, ...], ...], ...]

    @property
    def error(self) -> float:
        """Completeness: the sum of the attributions less the difference of the scores, zero but for the steps."""
        return sum(self.attributions) - (self.score - self.baseline_score)

    def to_dict(self) -> dict:
        """All but the attention maps, in types that JSON knows."""
        values = dataclasses.asdict(dataclasses.replace(self, attentions=None))
        del values["attentions"]
        return values | {"error": self.error}


def explain(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    pair: str | None = None,
    *,
    label: str | None = None,
    baseline: str = "mask",
    steps: int = 50,
    top: int = 5,
    mlm: MLMHead | None = None,
) -> Explanation:
    """Why a classifier says what it says of a text, or a masked language model what it puts for the first [MASK].

    Args:
        label: the class, or the token, to explain; by default the likeliest.
        baseline: "mask" or "pad", whose token stands where a word is taken away.
        steps: points of the integral; more of them make the error smaller.
        top: tokens to keep of each guess.
        mlm: the head that guesses; by default the model's own, where it has one.
    Raises:
        ValueError: a text empty, too long, alone where the model learned from pairs or the reverse, or without a [MASK]
            to fill, an unknown label or baseline, a model that is causal, of several labels or of another head, a head
            of another size, or captum is not installed.
    """
    one_of("baseline", baseline, BASELINES)
    if top < 1:
        raise ValueError(f"top={top} is not positive")
    if not text.strip():
        raise ValueError(f"text={text!r} is empty")
    texts = (model.config.task_specific_params or {}).get("texts")
    if texts == (2 if pair is None else 1):
        raise ValueError(f"pair={pair!r}: the model reads {'single texts' if texts == 1 else 'pairs'}")
    mlm = check_model(model, mlm)
    encoded = tokenizer(text, pair, return_offsets_mapping=True)
    ids, types, limit = encoded.input_ids, encoded.token_type_ids, model.config.max_position_embeddings
    if len(ids) > limit:
        raise ValueError(f"the text has {len(ids)} tokens, the model takes {limit}: shorten it")
    masks = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    stand_in = tokenizer.mask_token_id if baseline == "mask" else tokenizer.pad_token_id
    fixed = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    was_training = model.training
    model.eval()
    try:
        batch = pack([ids], [types]).to(next(model.parameters()).device)
        position, predictions, chosen, score = subject(model, tokenizer, batch, masks, label, top)
        guessed = () if mlm is None else tuple(masks or range(len(ids)))
        attentions, guesses = look(model, tokenizer, batch, mlm, guessed, top)
        without = [i if i in fixed else stand_in for i in ids]
        parts, present, absent = integrated_gradients(model, score, ids, types, without, steps=steps)
    finally:
        model.train(was_training)
    return Explanation(
        text=text, pair=pair, tokens=tuple(tokenizer.convert_ids_to_tokens(ids)), types=tuple(types),
        offsets=tuple(encoded.offset_mapping), predictions=predictions, label=chosen, position=position,
        baseline=tokenizer.convert_ids_to_tokens(stand_in), score=present, baseline_score=absent,
        attributions=tuple(parts.tolist()), words=join_words((text, pair), tokenizer, encoded, parts.tolist()),
        attentions=attentions, guessed=guessed, guesses=guesses,
    )  # fmt: skip


def check_model(model: Model, mlm: MLMHead | None) -> MLMHead | None:
    """Refuse what cannot be explained; returns the head that guesses: the one given, the model's own, or None."""
    if model.config.causal:
        raise ValueError("causal=True: only classifiers and models that fill masks can be explained")
    if isinstance(model, BertForSequenceClassification):
        if isinstance(task_of(model), MultiLabel):
            raise ValueError("problem_type='multi_label_classification': only one class of several can be explained")
    elif not isinstance(model, BertForMaskedLM | BertForPreTraining):
        raise ValueError(f"{type(model).__name__}: only classifiers and models that fill masks can be explained")
    elif mlm is None:
        return model.mlm
    config = model.config
    if mlm is not None and mlm.decoder.weight.shape != (config.vocab_size, config.hidden_size):
        vocab_size, hidden_size = mlm.decoder.weight.shape
        raise ValueError(
            f"the head of mlm has vocab_size={vocab_size}, hidden_size={hidden_size}: the model has "
            f"{config.vocab_size} and {config.hidden_size}"
        )
    return mlm


@torch.no_grad()
def subject(
    model: Model, tokenizer: Tokenizer, batch: Batch, masks: list[int], label: str | None, top: int
) -> tuple[int | None, tuple[Guess, ...], str, Score]:
    """What is explained: its position where it is a mask, the model's predictions, the label, and its score."""
    if isinstance(model, BertForSequenceClassification):
        names, logits = model.config.id2label, model(batch).logits[0].float()
        if label is not None:
            one_of("label", label, names)
        index = int(logits.argmax()) if label is None else names.index(label)
        task = task_of(model)
        order = () if isinstance(task, Regression) else logits.argsort(descending=True).tolist()
        shares = (logits / task.temperature).softmax(-1)
        predictions = tuple((names[i], float(shares[i])) for i in order)
        return None, predictions, names[index], class_score(index)
    if not masks:
        raise ValueError(f"the text has no {tokenizer.mask_token}, and the model has no classifier")
    ctx, encoded = model.encode(batch, None)
    [predictions] = likeliest(model.mlm(encoded.last_hidden_state[masks[:1]], ctx), tokenizer, top)
    chosen = predictions[0][0] if label is None else label
    if chosen not in tokenizer.get_vocab():
        raise ValueError(f"label={label!r} is not a token of the vocabulary: is it a word of several pieces?")
    return masks[0], predictions, chosen, token_score(masks[0], tokenizer.convert_tokens_to_ids(chosen))


@torch.no_grad()
def look(
    model: Model, tokenizer: Tokenizer, batch: Batch, mlm: MLMHead | None, guessed: tuple[int, ...], top: int
) -> tuple[Tensor, tuple]:
    """Attention maps [L, H, S, S], and what `mlm` reads at `guessed` from the embeddings and from every layer."""
    ctx, seen = model.encode(batch, None, output_hidden_states=True, output_attentions=True)
    states = seen.hidden_states if guessed else ()
    guesses = tuple(likeliest(mlm(state[list(guessed)], ctx), tokenizer, top) for state in states)
    return torch.cat(seen.attentions).float().cpu(), guesses


def likeliest(logits: Tensor, tokenizer: Tokenizer, top: int) -> tuple[tuple[Guess, ...], ...]:
    """The `top` tokens of each row of logits [P, V]."""
    best = logits.float().softmax(-1)[:, : tokenizer.vocab_size].topk(min(top, tokenizer.vocab_size))
    names = map(tokenizer.convert_ids_to_tokens, best.indices.tolist())
    return tuple(tuple(zip(*row, strict=True)) for row in zip(names, best.values.tolist(), strict=True))


def join_words(texts: tuple, tokenizer: Tokenizer, encoded: Encoding, parts: list[float]) -> tuple[Word, ...]:
    """Pieces put together where one goes on with the last (`##ing`)."""
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    starts = [i for i in range(len(ids)) if not tokenizer.is_continuation[ids[i]] or offsets[i][0] != offsets[i - 1][1]]
    words = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        written = texts[encoded.token_type_ids[start]][offsets[start][0] : offsets[stop - 1][1]]
        name = written or tokenizer.convert_ids_to_tokens(ids[start])
        words.append(Word(name, start, stop, sum(parts[start:stop])))
    return tuple(words)
