"""The architecture as one frozen, validated dataclass, and the presets."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Norm = Literal["layernorm", "rmsnorm"]
Ffn = Literal["mlp", "geglu", "swiglu"]
Activation = Literal["gelu", "gelu_tanh"]
Position = Literal["learned", "rotary", "alibi"]
Block = Literal["post"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """A BERT encoder (Devlin et al., 2019). Field names are Hugging Face's wherever the field exists there.

    The slots `norm`, `ffn`, `position` and `block` name an entry of the tables `NORMS`, `FFNS`, `POSITIONS` and
    `BLOCKS` in `minibert.model`; entries added there by other code are accepted too. With `causal`, a token sees none
    that comes after it: Hugging Face's is_decoder, without cross-attention.
    `finetuning_task` names what a head was trained for; `task_specific_params` are that task's options and what it
    learned beside the weights, kept as JSON gives them back (a tuple is a list).
    Raises ValueError, naming field, value and what is expected.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    tie_word_embeddings: bool = True
    causal: bool = False
    norm: str = "layernorm"
    ffn: str = "mlp"
    position: str = "learned"
    block: str = "post"
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: ProblemType | None = None
    finetuning_task: str | None = None
    task_specific_params: dict[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
        )
        for name in (*positive.split(), "type_vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} is not in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
            )
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id!r} is not in [0, vocab_size={self.vocab_size})")
        for name in ("tie_word_embeddings", "causal"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not true or false")
        one_of("hidden_act", self.hidden_act, get_args(Activation))
        if self.problem_type is not None:
            one_of("problem_type", self.problem_type, get_args(ProblemType))
        labels = tuple(self.id2label) if isinstance(self.id2label, list | tuple) else ()
        if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
            raise ValueError(f"id2label={self.id2label!r} is not a list of distinct names")
        object.__setattr__(self, "id2label", labels)
        if self.finetuning_task is not None and not (isinstance(self.finetuning_task, str) and self.finetuning_task):
            raise ValueError(f"finetuning_task={self.finetuning_task!r} is not a name")
        if self.task_specific_params is not None:
            object.__setattr__(self, "task_specific_params", _as_json(self.task_specific_params))

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def label2id(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.id2label)}

    def replace(self, **changes: Any) -> "BertConfig":
        """A copy with some fields changed; unknown names are refused with the nearest known one."""
        refuse_unknown(changes, self)
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "BertConfig":
        """One of `PRESETS`, with some fields changed."""
        one_of("model", name, PRESETS)
        return cls(**PRESETS[name]).replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"id2label": list(self.id2label)}


def _as_json(params: Any) -> dict[str, Any]:
    """A copy of `params` as it comes back from a file."""
    try:
        copy = json.loads(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"task_specific_params holds what JSON cannot ({error})") from None
    if not isinstance(copy, dict):
        raise ValueError(f"task_specific_params={params!r} is not an object of names and values")
    return copy


def _sizes(layers: int, hidden: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }


# Devlin et al. (2019) and, for tiny to small, Turc et al. (2019)
PRESETS = {
    "bert-tiny": _sizes(2, 128),
    "bert-mini": _sizes(4, 256),
    "bert-small": _sizes(4, 512),
    "bert-base": _sizes(12, 768),
    "bert-large": _sizes(24, 1024),
}


SHOWN = 20  # names in a message


def one_of(field: str, value: Any, known) -> None:
    """Raise ValueError unless value is in known; the message offers the nearest name."""
    if value not in list(known):
        near = difflib.get_close_matches(str(value), list(known), 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        names = list(map(str, known))
        shown = ", ".join(names if len(names) <= SHOWN else [*names[:SHOWN], f"… ({len(names)} in all)"])
        raise ValueError(f"{field}={value!r} is not one of {shown}{hint}")


def check_fractions(**values: float) -> None:
    """Raise ValueError for the first value that is not between 0 and 1."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} is not between 0 and 1")


def refuse_unknown(given, config, where: str = "config") -> None:
    """Raise ValueError for the first key of `given` that is no field of the dataclass `config`."""
    fields = [field.name for field in dataclasses.fields(config)]
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": known are {', '.join(fields)}"
            raise ValueError(f"unknown {where} key {key!r}{hint}")
