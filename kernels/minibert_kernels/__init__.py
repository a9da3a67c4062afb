"""BERT's ops on packed tokens: in Triton where there is a GPU, in plain torch everywhere."""

from .attention import attention
from .gelu import bias_geglu, bias_gelu, bias_swiglu
from .layer_norm import dropout_add_norm
from .reference import (
    attention_probs,
    embed_norm,
    linear_cross_entropy,
    pack,
    select_rows,
    unpack,
)

# those with a kernel beside their reference; each takes backend="auto" | "triton" | "reference"
TRITON_OPS = ("attention", "bias_geglu", "bias_gelu", "bias_swiglu", "dropout_add_norm")

__all__ = [
    "attention",
    "attention_probs",
    "bias_geglu",
    "bias_gelu",
    "bias_swiglu",
    "dropout_add_norm",
    "embed_norm",
    "linear_cross_entropy",
    "pack",
    "select_rows",
    "unpack",
]
