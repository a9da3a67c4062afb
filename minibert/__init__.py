"""minibert: BERT from scratch in PyTorch, with its own Triton kernels."""

from .batch import Batch
from .config import BertConfig
from .data.tokenizer import Tokenizer
from .model import (
    BertForJointClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForRelationExtraction,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "BertConfig",
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
    "Tokenizer",
]
