"""BERT's ops on packed tokens: in Triton where there is a GPU, in plain torch everywhere."""

from .attention import attention, attention_schedule
from .dispatch import TRITON_OPS as TRITON_OPS
from .embedding import embed_norm
from .gelu import bias_geglu, bias_gelu, bias_swiglu
from .lamb import lamb_step
from .layer_norm import dropout_add_norm
from .linear_cross_entropy import linear_cross_entropy
from .masking import mlm_mask
from .packing import pack, select_rows, unpack
from .reference import attention_probs

__all__ = [
    "attention",
    "attention_probs",
    "attention_schedule",
    "bias_geglu",
    "bias_gelu",
    "bias_swiglu",
    "dropout_add_norm",
    "embed_norm",
    "lamb_step",
    "linear_cross_entropy",
    "mlm_mask",
    "pack",
    "select_rows",
    "unpack",
]
