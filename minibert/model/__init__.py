"""The model: one slot a file, put together in `encoder.py`, with the heads in `heads.py` and `task_heads.py`."""

from .context import Output
from .encoder import BLOCKS, BertModel
from .ffn import FFNS
from .heads import BertForMaskedLM, BertForPreTraining
from .norm import NORMS
from .position import POSITIONS
from .task_heads import (
    BertForJointClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForRelationExtraction,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
)

MODELS = {
    kind.objective: kind
    for kind in (
        BertModel,
        BertForMaskedLM,
        BertForPreTraining,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertForMultipleChoice,
        BertForRelationExtraction,
        BertForJointClassification,
        BertForSentenceEmbedding,
    )
}

__all__ = [
    "BLOCKS",
    "FFNS",
    "MODELS",
    "NORMS",
    "POSITIONS",
    "BertForJointClassification",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForRelationExtraction",
    "BertForSentenceEmbedding",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Output",
]
