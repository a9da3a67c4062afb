"""minibert beside transformers on the same weights: every state, head, loss and gradient.

States and logits are compared by max|ours - theirs| / max(1, max|theirs|). A gradient is compared by
max|ours - theirs| over the largest of max|theirs| and a hundredth of the largest gradient in its layer: some
gradients, the key bias's above all, are zero but for rounding, and have no scale of their own.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..batch import IGNORE
from ..data.tokenizer import Tokenizer
from ..hub import BIAS, DECODER_BIAS, architecture, hf_config, hf_names
from ..model import (
    MODELS,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from ..model.losses import problem_type

STATE_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
GRADIENT_FLOOR = 1e-2
TEXTS = (
    ("The ferry left the harbour before the fog had lifted.", "Nobody on the pier noticed that it was early."),
    ("Can a kettle whistle in the key of C?", "Ours does, slightly flat, every single morning!"),
    ("She filed the report; it was 37 pages long.", None),
    ("Yes.", None),
)


@dataclass(frozen=True)
class Row:
    """One comparison: `error` as the module says, within `limit` where `passed`."""

    inputs: str
    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def first_difference(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)

    def to_dict(self) -> dict:
        first = self.first_difference
        return {
            "passed": self.passed,
            "first_difference": first and f"{first.inputs}: {first.what}",
            "state_error": max(row.error for row in self.rows if row.limit == STATE_LIMIT),
            "gradient_error": max(row.error for row in self.rows if row.limit == GRADIENT_LIMIT),
            "rows": [asdict(row) | {"passed": row.passed} for row in self.rows],
        }


def parity(directory, *, allow_pickle: bool = False, backend: str = "auto", device: str = "cpu") -> Report:
    """Load `directory` with minibert and with transformers and compare them in float32.

    Raises:
        ValueError: transformers is not installed, or the directory is no checkpoint.
    """
    kind = MODELS[architecture(directory, allow_pickle)]
    kind = kind if kind.in_transformers else BertModel  # transformers has only the encoder
    ours = kind.from_pretrained(directory, allow_pickle=allow_pickle, backend=backend)
    if isinstance(ours, BertForTokenClassification):
        ours.crf = None  # transformers has none: what lies below is compared
    if hf_config(ours.config, "")["model_type"] != "bert":
        raise ValueError(f"{directory}: its norm, ffn, position or block is not BERT's: transformers has no such model")
    theirs = load_theirs(kind, directory, add_pooler=getattr(ours, "pooler", None) is not None)
    batches = {
        name: {key: value.to(device) for key, value in batch.items()} for name, batch in inputs(directory, ours.config)
    }
    return compare(ours.to(device), theirs.to(device), batches)


def load_theirs(kind: type, directory, attention: str = "eager", add_pooler: bool = True) -> nn.Module:
    """The transformers model of the same name, in float32 and eval mode; `add_pooler` is for a bare encoder."""
    try:
        import transformers
    except ImportError:
        raise ValueError("parity needs transformers: pip install 'minibert[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = copy.deepcopy(transformers.BertConfig.from_pretrained(directory))
    reference, options = (
        getattr(transformers, kind.__name__),
        {"attn_implementation": attention, "dtype": torch.float32},
    )
    if kind is BertModel:
        options["add_pooling_layer"] = add_pooler
    return reference.from_pretrained(directory, config=config, local_files_only=True, **options).eval()


def inputs(directory, config) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Padded batches with types, as (name, arguments): random ids, and sentence pairs where there is a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    size = min(23, config.max_position_embeddings)
    lengths = torch.tensor([1, 7, 23, 16, 12]).clamp(max=size)
    ids = torch.randint(1, config.vocab_size, (5, size), generator=generator)
    ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    mask = (torch.arange(size) < lengths[:, None]).long()
    types = (torch.arange(size) >= lengths[:, None] // 2).long() * mask * (config.type_vocab_size > 1)
    yield (
        "random",
        {"input_ids": ids * mask + config.pad_token_id * (1 - mask), "attention_mask": mask, "token_type_ids": types},
    )
    if any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        tokenizer = Tokenizer.from_pretrained(directory)
        first, second = zip(*TEXTS, strict=True)
        singles = [a for a, b in TEXTS if b is None]
        pairs = [(a, b) for a, b in TEXTS if b is not None]
        for name, call in (("pairs", tuple(map(list, zip(*pairs, strict=True)))), ("text", (singles,))):
            encoded = tokenizer(
                *call, truncation=True, max_length=config.max_position_embeddings, padding=True, return_tensors="pt"
            )
            yield name, {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


def compare(ours: nn.Module, theirs: nn.Module, batches: dict[str, dict[str, Tensor]]) -> Report:
    """All rows, in the order of the forward pass, then the gradients from the first layer to the heads."""
    rows = []
    for name, batch in batches.items():
        labels, mask = targets(ours, batch), batch["attention_mask"].bool()
        if isinstance(ours, BertForMultipleChoice):
            batch = {key: value[None] for key, value in batch.items()}  # all of them choices of one question
        left, right = run(ours, batch | labels), run(theirs, batch | labels)
        rows += [Row(name, what, error, STATE_LIMIT) for what, error in state_errors(left, right, mask)]
        rows += [Row(name, what, error, GRADIENT_LIMIT) for what, error in gradient_errors(ours, theirs)]
    return Report(tuple(rows))


def targets(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels for every head that `model` has, but an answer's: there padding is part of transformers' loss."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if isinstance(model, BertForMaskedLM | BertForPreTraining):
        labels = torch.where(
            mask & (torch.arange(ids.shape[1], device=ids.device) % 3 == 0), (ids + 1) % model.config.vocab_size, IGNORE
        )
        pairs = {"next_sentence_label": torch.arange(len(ids), device=ids.device) % 2}
        return {"labels": labels} | (pairs if isinstance(model, BertForPreTraining) else {})
    if isinstance(model, BertForTokenClassification):
        return {"labels": torch.where(mask, ids % model.config.num_labels, IGNORE)}
    if isinstance(model, BertForMultipleChoice):
        return {"labels": torch.ones(1, dtype=torch.int64, device=ids.device)}
    if isinstance(model, BertForSequenceClassification):
        labels, n = torch.arange(len(ids), device=ids.device), model.config.num_labels
        if problem_type(model.config, labels) == "single_label_classification":
            return {"labels": labels % n}
        return {"labels": (labels % 2).float() if n == 1 else torch.stack([labels % 2] * n, 1).float()}
    return {}


def run(model: nn.Module, batch: dict[str, Tensor]):
    """One forward and backward pass; without a loss it is the mean square of the states, or of the answer's scores."""
    model.zero_grad(set_to_none=True)
    extra = {"output_logits": True} if isinstance(model, BertForMaskedLM | BertForPreTraining) else {}
    pooled, pooler = [], getattr(model, "bert", model).pooler
    hook = pooler and pooler.register_forward_hook(lambda *call: pooled.append(call[-1]))
    output = model(**batch, output_hidden_states=True, **extra)
    if hook:
        hook.remove()
        output.pooler_output = pooled[0]  # models with heads keep it to themselves
    if getattr(output, "loss", None) is not None:
        output.loss.backward()
        return output
    mask = batch["attention_mask"][..., None]
    answers = getattr(output, "start_logits", None) is not None
    states = torch.stack([output.start_logits, output.end_logits], -1) if answers else output.last_hidden_state
    weights = torch.linspace(-1, 1, states.shape[-1], device=mask.device)
    loss = (states.masked_fill(mask == 0, 0).pow(2) * weights).sum() / mask.sum()
    if hook:
        loss = loss + (output.pooler_output * weights).mean()
    loss.backward()
    return output


def state_errors(ours, theirs, mask: Tensor) -> Iterator[tuple[str, float]]:
    for layer, (a, b) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        yield f"layer {layer}" if layer else "embeddings", scaled(a[mask], b[mask])
    token_level = ("prediction_logits",) if hasattr(theirs, "prediction_logits") else ()
    heads = (*token_level, "seq_relationship_logits", "start_logits", "end_logits", "logits", "loss")
    for name in ("pooler_output", *heads):
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        if a is not None and b is not None:
            by_token = a.ndim > 1 and a.shape[:2] == mask.shape
            yield name.replace("_", " "), scaled(a[mask], b[mask]) if by_token else scaled(a, b)


def scaled(ours: Tensor, theirs: Tensor, floor: float = 1.0) -> float:
    """max|ours - theirs| / max(floor, max|theirs|)."""
    ours, theirs = ours.detach(), theirs.detach()
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=floor))
    return float("inf") if math.isnan(error) else error  # nan would lose itself in a max


def gradient_errors(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, float]]:
    """One row a layer: the worst of its parameters, by Hugging Face's name."""
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    if DECODER_BIAS in expected:
        expected[BIAS] = expected.pop(DECODER_BIAS)
    groups: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
    for name, parameter in ours.named_parameters():
        names = hf_names(name)
        if parameter.grad is None or names[0] not in expected:
            continue
        for their_name, grad in zip(names, parameter.grad.chunk(len(names)), strict=True):
            groups.setdefault(place(their_name), []).append((their_name, grad, expected[their_name]))
    lost = set(expected) - {name for group in groups.values() for name, _, _ in group}
    for group, members in groups.items():
        floor = max(GRADIENT_FLOOR * max(float(b.abs().max()) for _, _, b in members), 1e-12)
        error, name = max((scaled(a, b, floor), name) for name, a, b in members)
        yield f"gradients, {group} (worst: {name.removeprefix('bert.')})", error
    if lost:
        yield f"gradients, missing: {', '.join(sorted(lost))}", float("inf")


def place(name: str) -> str:
    """The layer or head that a Hugging Face parameter belongs to."""
    parts = name.removeprefix("bert.").split(".")
    if parts[0] == "encoder":
        return f"layer {int(parts[2]) + 1}"
    return " ".join(parts[:2]) if parts[0] == "cls" else parts[0]
