"""Published ways to pretrain, as options of `minibert pretrain`; each says where it deviates from its source.

What all of them have in common: a batch counts tokens and is packed, where the sources count sequences and pad, so
256 × 128 means 32,768 tokens of sequences of at most 128. Batches that were spread over many machines are added up from
micro-batches of 16,384 tokens (`accumulate`), which gives the same step on one. Samples are made as for Devlin et al.,
one in ten of them short. Dropout is that of the architecture, .1, where nothing is said.
"""

from collections.abc import Iterable
from typing import Any

from ..config import one_of

MICRO = 16384  # tokens


def _batch(sequences: int, length: int) -> dict[str, int]:
    return {"max_length": length, "batch_tokens": MICRO, "accumulate": sequences * length // MICRO}


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {"vocab_size": 30522, "objectives": ["mlm", "nsp"], "mask_rate": 0.15, "weight_decay": 0.01, "clip": 1.0}
_ORIGINAL = _BERT | {"model": "bert-base", "optimizer": "bertadam", "schedule": "linear", "save_every": 1000}
_NVLAMB = _BERT | {
    "model": "bert-large", "optimizer": "lamb", "schedule": "polynomial", "power": 0.5, "dtype": "bfloat16",
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    # Devlin et al. (2019): 1 M steps of 256 sequences, on one line from the peak to 0; the first 900,000 of length 128.
    # Deviates: 15 % of the tokens are masked however many they are (there: 20 of a sequence at most); float32.
    "original": _ORIGINAL | {"phases": [
        _batch(256, 128) | {"steps": 900_000, "lr": 1e-4, "warmup": 1 / 90, "final_lr": 10 / 99},
        _batch(256, 512) | {"steps": 100_000, "lr": 1e-4 * 10 / 99, "warmup": 0.0},
    ]},
    # NVIDIA DeepLearningExamples, BERT-large in two phases. Deviates: bfloat16 for float16 with a loss scale; the
    # moments' bias correction counts on from the first phase (there: begins again).
    "nvlamb": _NVLAMB | {"phases": [
        _batch(65536, 128) | {"steps": 7038, "lr": 6e-3, "warmup": 0.2843},
        _batch(32768, 512) | {"steps": 1563, "lr": 4e-3, "warmup": 0.128},
    ]},
    # MosaicBERT (Portes et al., 2023). Its weight decay of 1e-5 is not multiplied by the rate: here, the same step at
    # the peak. Deviates: ALiBi's slopes are one geometric sequence; biases and norms do not decay; evaluates at 30 %.
    "mosaic": _batch(4096, 128) | {
        "model": "bert-base", "arch": {"ffn": "geglu", "position": "alibi", "attention_probs_dropout_prob": 0.0},
        "vocab_size": 30522, "objectives": ["mlm"], "mask_rate": 0.3, "steps": 70_000, "optimizer": "adamw",
        "lr": 5e-4, "beta2": 0.98, "weight_decay": 1e-5 / 5e-4, "warmup": 0.06, "schedule": "linear", "final_lr": 0.02,
        "clip": None, "dtype": "bfloat16", "save_every": 1000,
    },
    # Geiping & Goldstein (2023), a day on one GPU. Deviates: post-norm, learned positions and biases; the rate rises
    # from 0 for three quarters of the time (there: from a quarter of its peak); bfloat16 for float16.
    "crammed": _batch(8192, 128) | {
        "model": "bert-base", "vocab_size": 32768,
        "arch": _NO_DROPOUT | {"ffn": "geglu", "num_hidden_layers": 16, "intermediate_size": 1536},
        "objectives": ["mlm"], "mask_rate": 0.25, "mask_count": MICRO // 4, "minutes": 1440.0, "ramp": 0.6,
        "optimizer": "adamw", "lr": 1e-3, "beta2": 0.98, "eps": 1e-12, "weight_decay": 0.01, "warmup": 0.75,
        "schedule": "linear", "clip": 0.5, "dtype": "bfloat16",
    },
    # Izsak et al. (2021), a day on eight GPUs. Deviates: post-norm, which may want a lower rate; bfloat16 for float16.
    "24h": _batch(4096, 128) | {
        "model": "bert-large", "vocab_size": 30522, "objectives": ["mlm"], "mask_rate": 0.15, "minutes": 1440.0,
        "optimizer": "adamw", "lr": 1e-3, "beta2": 0.98, "weight_decay": 0.01, "warmup": 0.06, "schedule": "linear",
        "clip": None, "dtype": "bfloat16",
    },
    # after ModernBERT (Warner et al., 2024) and NeoBERT (2025), with the parts there are. Deviates: post-norm, biases,
    # no local windows; AdamW without the update clipping of StableAdamW, weight decay as for mosaic; length 512 for
    # 1,024; scaled from 1.7 T tokens to 52 G: 100,000 steps of half a million, warm-up 2 %, and the last 10 % for the
    # decay.
    "modern": _batch(1024, 512) | {
        "model": "bert-base", "vocab_size": 32768,
        "arch": _NO_DROPOUT | {"ffn": "geglu", "intermediate_size": 2048, "position": "rotary"},
        "objectives": ["mlm"], "mask_rate": 0.3, "steps": 100_000, "optimizer": "adamw", "lr": 8e-4, "beta2": 0.98,
        "weight_decay": 1e-5 / 8e-4, "warmup": 0.02, "schedule": "trapezoid", "decay": 0.1, "clip": 1.0,
        "dtype": "bfloat16", "save_every": 1000,
    },
}  # fmt: skip

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")  # which a model has of its own
# an option of a recipe that means nothing beside another one that was given
REPLACED = {"steps": ("minutes",), "minutes": ("steps",), "mask_count": ("mask_rate", "batch_tokens")}
SHARES = ("steps", "minutes")  # what a phase gets of that which is given for all of them


def recipe_options(name: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """The options of a recipe, without those that the given ones replace: `minutes` replaces `steps`, and so on.

    A `model` that is given has its own sizes.

    What is given replaces the same in its phases, too, but for their steps: by those it is shared out.
    Raises:
        ValueError: there is no such recipe.
    """
    one_of("recipe", name, RECIPES)
    given = set(given)

    def stays(key: str) -> bool:
        return given.isdisjoint(REPLACED.get(key, ()))

    options = {key: value for key, value in RECIPES[name].items() if stays(key)}
    if "model" in given and "arch" in options:
        options["arch"] = {key: value for key, value in options["arch"].items() if key not in SIZES}
    if "phases" in options:
        options["phases"] = [
            {key: value for key, value in phase.items() if key in SHARES or (key not in given and stays(key))}
            for phase in options["phases"]
        ]
    return options
