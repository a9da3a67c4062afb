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
    "pipeline",
]


def __getattr__(name: str):
    if name == "pipeline":  # not until it is asked for: it needs the tasks, and they the training
        from .tasks.pipelines import pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
