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
from .version import __version__

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
    "Trainer",
    "__version__",
    "pipeline",
]


def __getattr__(name: str):
    # these two not until they are asked for: they need the tasks, and those the training
    if name == "pipeline":
        from .tasks.pipelines import pipeline

        return pipeline
    if name == "Trainer":
        from .tasks.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
