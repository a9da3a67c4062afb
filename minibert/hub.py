"""Hugging Face's BERT layout on disk, in and out, without transformers.

A directory holds `config.json`, `model.safetensors` (or shards with `model.safetensors.index.json`, or, only when
asked, `pytorch_model.bin`) and `tokenizer.json`. Loading is strict: every missing, unexpected, mis-shaped or
conflicting key is listed. What `save_pretrained` writes carries a `manifest.json` of sha256 sums, which loading
verifies wherever it is there.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import BertConfig, one_of
from .files import verify_manifest, write_atomically, write_manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the weights of a model that is loaded
WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
# what a manifest vouches for: other files of the directory may change
WRITTEN = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt")

# ours, Hugging Face's; applied in order to a parameter's name
RENAMES = (
    ("embeddings.word.", "embeddings.word_embeddings."),
    ("embeddings.position.", "embeddings.position_embeddings."),
    ("embeddings.token_type.", "embeddings.token_type_embeddings."),
    ("embeddings.norm.", "embeddings.LayerNorm."),
    ("encoder.layers.", "encoder.layer."),
    (".attention.out.", ".attention.output.dense."),
    (".attention_norm.", ".attention.output.LayerNorm."),
    (".ffn.up.", ".intermediate.dense."),
    (".ffn.down.", ".output.dense."),
    (".ffn_norm.", ".output.LayerNorm."),
    ("mlm.dense.", "cls.predictions.transform.dense."),
    ("mlm.norm.", "cls.predictions.transform.LayerNorm."),
    ("mlm.decoder.weight", "cls.predictions.decoder.weight"),
    ("mlm.decoder.bias", "cls.predictions.bias"),
    ("nsp.", "cls.seq_relationship."),
)
DECODER, WORD = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
# Hugging Face names the decoder's bias twice; where nothing is tied these are two tensors, and it adds the first
DECODER_BIAS, BIAS = "cls.predictions.decoder.bias", "cls.predictions.bias"
# what a model may leave unread, or start afresh, as a whole
HEADS = (
    "bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "intent_classifier.", "qa_outputs.",
    "crf.",
)  # fmt: skip
# the heads that make a directory one of these, beside the encoder
ARCHITECTURES = {
    "BertModel": (),
    "BertForSentenceEmbedding": (),
    "BertForMaskedLM": ("cls.predictions.",),
    "BertForPreTraining": ("cls.predictions.", "cls.seq_relationship."),
    "BertForSequenceClassification": ("classifier.",),
    "BertForTokenClassification": ("classifier.",),
    "BertForQuestionAnswering": ("qa_outputs.",),
    "BertForMultipleChoice": ("classifier.",),
    "BertForRelationExtraction": ("classifier.",),
    "BertForJointClassification": ("classifier.", "intent_classifier."),
}
# which labels a head is as wide as: when they are changed, a head of another width starts afresh
WIDTHS = {"classifier.": "id2label", "crf.": "id2label", "intent_classifier.": "task_specific_params"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
SLOTS = {"norm": "layernorm", "ffn": "mlp", "position": "learned", "block": "post"}  # as Hugging Face's BERT has them


def from_pretrained(
    cls: type, directory, *, allow_pickle: bool = False, backend: str = "auto", dtype: str | torch.dtype = "float32",
    **config_changes: Any,
) -> nn.Module:  # fmt: skip
    """A `cls` with the weights of `directory`, in eval mode.

    Args:
        allow_pickle: also read `pytorch_model.bin` (with `weights_only=True`).
        dtype: of the weights, and so of all that is computed: a key of `DTYPES`, or its torch.dtype. Training wants
            float32, under autocast where it is to be faster. For inference bfloat16 takes half the memory, and less
            time where the processor has bfloat16 units (AMX, AVX-512 BF16, a GPU).
        config_changes: fields of `BertConfig`; `num_labels=n` is short for n unnamed labels.
    Returns:
        The model. `model.new_parameters` names the parameters of heads that the directory does not have: they are
        freshly initialised. Several tasks call their head `classifier`: where `config.json` says that it is another
        task's, it counts as one that the directory does not have. A bare encoder gets no pooler where none is stored.
    Raises:
        ValueError: not a checkpoint, damaged, or keys that do not fit; every one of them is listed.
    """
    directory, name = Path(directory), str(dtype).removeprefix("torch.")
    one_of("dtype", name, DTYPES)
    if "num_labels" in config_changes:
        config_changes["id2label"] = tuple(f"LABEL_{i}" for i in range(config_changes.pop("num_labels")))
    config = load_config(directory).replace(**config_changes)
    stored = stored_for(cls.objective, directory, allow_pickle)
    if config.tie_word_embeddings and apart(stored):
        config = config.replace(tie_word_embeddings=False)  # stored apart and different: what is stored wins
    bare = cls.objective == "BertModel" and not any(name.startswith("bert.pooler.") for name in stored)
    model = cls(config, backend=backend, **{"add_pooler": False} if bare else {})
    renewed = [head for head, labels in WIDTHS.items() if labels in config_changes]
    model.new_parameters = load_state_into(model, stored, directory, renewed)
    return model.eval().to(DTYPES[name])


def load_into(model: nn.Module, directory, *, allow_pickle: bool = False) -> None:
    """Load every parameter of `model` from `directory`; unlike `from_pretrained`, no head may be missing."""
    stored = stored_for(model.objective, directory, allow_pickle)
    fresh = load_state_into(model, stored, directory)
    if fresh:
        raise ValueError(f"{directory}: missing {', '.join(fresh)}")


def load_config(directory) -> BertConfig:
    """Read `config.json`, Hugging Face's or ours; a missing model_type is BERT's.

    Raises:
        ValueError: no such file, broken JSON, another architecture, or values that `BertConfig` refuses.
    """
    raw = _load_json(directory)
    try:
        return _read_config(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(directory) / 'config.json'}: {error}") from None


def _load_json(directory) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _named(directory) -> list[str]:
    """The classes of ours that `config.json` names."""
    names = _load_json(directory).get("architectures")
    return [name for name in names if name in list(ARCHITECTURES)] if isinstance(names, list) else []


def _read_config(raw: dict) -> BertConfig:
    kind = raw.get("model_type", "bert")
    if kind not in ("bert", "minibert"):
        raise ValueError(f"model_type={kind!r} is not bert")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type={raw['position_embedding_type']!r} is not supported: only absolute")
    if raw.get("add_cross_attention"):
        raise ValueError("add_cross_attention=true is not supported: minibert has no encoder to attend to")
    if "hidden_size" not in raw or "num_hidden_layers" not in raw:
        raise ValueError("hidden_size or num_hidden_layers is missing: not a BERT configuration")
    activation = raw.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    known = set(BertConfig().to_dict()) - (set() if kind == "minibert" else set(SLOTS))
    values = {key: value for key, value in raw.items() if key in known and key not in ("id2label", "causal")}
    values["causal"] = raw.get("is_decoder") or False
    if values.get("pad_token_id", 0) is None:
        del values["pad_token_id"]
    return BertConfig(**values | {"hidden_act": ACTIVATIONS[activation], "id2label": _read_labels(raw)})


def _read_labels(raw: dict):
    labels = raw.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{i}" for i in range(raw.get("num_labels", 2)))
    if isinstance(labels, dict):
        order = sorted(labels, key=int)
        if [int(key) for key in order] != list(range(len(order))):
            raise ValueError(f"id2label has the keys {', '.join(order)}: expected 0 to {len(order) - 1}")
        return tuple(labels[key] for key in order)
    return labels


def load_state(directory, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a directory, under the names they are stored with.

    Raises:
        ValueError: no weights, a damaged file (checked against `manifest.json` where there is one), an index that
            points outside the directory, or a pickle that was not asked for.
    """
    directory = Path(directory)
    if (directory / "manifest.json").is_file():
        verify_manifest(directory)
    if (directory / WEIGHTS).is_file():
        return _load_safetensors(directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _load_shards(directory)
    if not (directory / PICKLE).is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no {WEIGHTS}")
    if not allow_pickle:
        raise ValueError(f"{directory} has only {PICKLE}, a pickle: pass allow_pickle=True (--allow-pickle) to read it")
    try:
        state = torch.load(directory / PICKLE, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{directory / PICKLE}: not a readable pickle of tensors ({reason})") from None
    tensors = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not tensors:
        raise ValueError(f"{directory / PICKLE}: expected a dictionary of tensors")
    for name, value in state.items():
        if not _is_stored(value):
            raise ValueError(f"{directory / PICKLE}: {name!r} is not dense, or larger than what is stored of it")
    return state


def _is_stored(value: Tensor) -> bool:
    """Whether each element of a tensor has bytes of its own: a stride of 0 makes terabytes of four bytes."""
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def _load_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected an object with a weight_map ({error})") from None
    return where


def _load_shards(directory: Path) -> dict[str, Tensor]:
    path, state = directory / INDEX, {}
    where = _load_index(path)
    for name in sorted(set(where.values())):
        if not isinstance(name, str) or Path(name).name != name or (directory / name).is_symlink():
            raise ValueError(f"{path}: {name!r} is not the name of a file in this directory")
        if not (directory / name).is_file():
            raise ValueError(f"{path}: {name!r} is missing")
        shard = _load_safetensors(directory / name)
        twice = sorted(shard.keys() & state.keys())
        if twice:
            raise ValueError(f"{directory / name}: {', '.join(twice)} in another shard too")
        state |= shard
    lost = sorted(set(where) - set(state))
    if lost:
        raise ValueError(f"{path}: {', '.join(lost)} in no shard")
    return state


def canonical(state: dict[str, Tensor], directory="checkpoint") -> dict[str, Tensor]:
    """Stored names to those of Hugging Face's BertForPreTraining: one name a parameter, encoder under `bert.`.

    Raises:
        ValueError: two stored tensors are one parameter and differ, or a value is no finite floating point number.
    """
    result, problems = {}, []
    for stored, value in state.items():
        name = stored.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.endswith("position_ids"):
            continue
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        if name in result and not torch.equal(result[name], value):
            problems.append(f"conflicting {stored}: another tensor for {name} differs")
        if not value.is_floating_point():
            problems.append(f"not floating point {stored}")
        elif not value.isfinite().all():
            problems.append(f"not finite {stored}")
        result[name] = value
    if DECODER_BIAS in result:
        bias = result.pop(DECODER_BIAS)
        if not apart(result) and not torch.equal(result.get(BIAS, bias), bias):
            problems.append(f"conflicting {DECODER_BIAS}: {BIAS} differs")
        result[BIAS] = bias
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems)}")
    return result


def apart(state: dict[str, Tensor]) -> bool:
    """Whether a decoder of its own is stored, other than the word embedding."""
    return DECODER in state and not (WORD in state and torch.equal(state[DECODER], state[WORD]))


def stored_names(directory, allow_pickle: bool = False) -> list[str]:
    """The names in a directory's weights; of safetensors only the header is read, or the index of shards."""
    directory = Path(directory)
    if (directory / WEIGHTS).is_file():
        try:
            with safetensors.safe_open(directory / WEIGHTS, "pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / WEIGHTS}: damaged or not a safetensors file ({error})") from None
    if (directory / INDEX).is_file():
        return list(_load_index(directory / INDEX))
    return list(load_state(directory, allow_pickle))


def architecture(directory, allow_pickle: bool = False) -> str:
    """The class that `config.json` names, where its heads are stored, or else the one with the most heads that are."""
    names = stored_names(directory, allow_pickle)
    for kind in _named(directory):
        if all(any(name.startswith(head) for name in names) for head in ARCHITECTURES[kind]):
            return kind
    if "classifier.weight" in names:
        return "BertForSequenceClassification"
    if "cls.seq_relationship.weight" in names:
        return "BertForPreTraining"
    return "BertForMaskedLM" if any(name.startswith("cls.predictions.") for name in names) else "BertModel"


def stored_for(objective: str, directory, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The canonical tensors of a directory, without a `classifier`, and its CRF, that `config.json` says is of another
    class."""
    stored = canonical(load_state(directory, allow_pickle), directory)
    owners = [kind for kind in _named(directory) if "classifier." in ARCHITECTURES[kind]]
    if owners and objective not in owners:
        stored = {name: value for name, value in stored.items() if not name.startswith(("classifier.", "crf."))}
    return stored


def hf_names(name: str) -> tuple[str, ...]:
    """Our parameter name, as `BertForPreTraining` has it, to the Hugging Face name, or three for a fused projection."""
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    if ".attention.qkv." in name:
        return tuple(name.replace(".qkv.", f".self.{part}.") for part in ("query", "key", "value"))
    return (name,)


def _under_bert(name: str) -> str:
    return "bert." + name if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def head_of(name: str) -> str | None:
    return next((head for head in HEADS if name.startswith(head)), None)


def load_state_into(
    model: nn.Module, stored: dict[str, Tensor], directory, renewed: Collection[str] = ()
) -> tuple[str, ...]:
    """Copy canonical tensors into `model`; returns the names of parameters in heads that are not stored at all.

    `renewed`: heads that, where they have another width, count as not stored.
    """
    wanted = {ours: hf_names(_under_bert(ours)) for ours, _ in model.named_parameters()}
    state, fresh, problems, read = dict(model.named_parameters()), [], [], set()
    for ours, names in wanted.items():
        read.update(names)
        head = head_of(names[0])
        same_head = [name for name in stored if head and name.startswith(head)]
        lost = [name for name in names if name not in stored]
        if lost and head and not same_head:
            fresh.append(ours)
            continue
        if lost:
            problems += [f"missing {name}" for name in lost]
            continue
        expected = state[ours].detach().chunk(len(names))
        wrong = [(name, part) for name, part in zip(names, expected, strict=True) if stored[name].shape != part.shape]
        if wrong and head in renewed:
            fresh.append(ours)
        elif wrong:
            problems += [f"mis-shaped {n}: {list(stored[n].shape)}, expected {list(part.shape)}" for n, part in wrong]
        else:
            for name, part in zip(names, expected, strict=True):
                part.copy_(stored[name])
    heads = {head_of(name) for name in read}
    unread = [name for name in stored if name not in read and name != DECODER and head_of(name) in heads | {None}]
    problems += [f"unexpected {name}" for name in unread]
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems)}")
    return tuple(fresh)


def hf_state(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of `model`, or those given for them, under Hugging Face's names, tied weights once."""
    state = {}
    for ours, value in (parameters or dict(model.named_parameters())).items():
        names = hf_names(ours)
        parts = value.detach().chunk(len(names)) if len(names) > 1 else (value.detach(),)
        state |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    if DECODER in state:
        state[DECODER_BIAS] = state[BIAS].clone()
    return state


def hf_config(config: BertConfig, architecture: str) -> dict[str, Any]:
    """`config.json` as Hugging Face writes it; model_type is bert where their BERT is the same architecture."""
    values = config.to_dict()
    slots = {name: values.pop(name) for name in SLOTS}
    labels = values.pop("id2label")
    for name in ("finetuning_task", "task_specific_params"):
        if values[name] is None:
            del values[name]
    if architecture == "BertForSentenceEmbedding":
        architecture = "BertModel"  # it has no weights of its own, and others load it by this name
    if values.pop("causal"):
        values["is_decoder"] = True
        architecture = "BertLMHeadModel" if architecture == "BertForMaskedLM" else architecture
    values["hidden_act"] = "gelu_pytorch_tanh" if config.hidden_act == "gelu_tanh" else config.hidden_act
    extra = {
        "architectures": [architecture],
        "model_type": "bert" if slots == SLOTS else "minibert",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": "float32",
    }
    return values | extra | ({"position_embedding_type": "absolute"} if slots == SLOTS else slots)


def save_pretrained(
    model: nn.Module, directory, tokenizer=None, parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Write config, weights (safetensors), tokenizer and manifest; transformers loads the result unchanged.

    `parameters`, by name, stand for the model's own where it has only its share of them. Each file is written beside
    its place and renamed, the manifest last.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(model.config, model.objective)
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_atomically(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = {name: value.cpu() for name, value in hf_state(model, parameters).items()}
    weights = safetensors.torch.save(state, {"format": "pt"})
    write_atomically(directory / WEIGHTS, weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_manifest(directory, only=WRITTEN)
