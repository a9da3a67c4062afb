"""The model: one slot a file, put together in `encoder.py`, with the heads in `heads.py`."""

from .context import Output
from .encoder import BLOCKS, BertModel
from .ffn import FFNS
from .heads import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from .norm import NORMS
from .position import POSITIONS

MODELS = {
    kind.objective: kind for kind in (BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification)
}

__all__ = [
    "BLOCKS",
    "FFNS",
    "MODELS",
    "NORMS",
    "POSITIONS",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertModel",
    "Output",
]
