"""Classification and regression of single texts and pairs: what is measured, and how a prediction looks."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..data.tasks import Example, Kind, LabelledData, encode_texts
from ..data.tokenizer import Tokenizer
from ..model import BertForSequenceClassification
from ..train import metrics


def kind_of(model: BertForSequenceClassification) -> Kind:
    """What the model predicts; one output without a stated problem type is regression, as in Hugging Face."""
    config = model.config
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            "problem_type='multi_label_classification' can be trained on, but not yet measured or predicted"
        )
    silent = config.problem_type is None and config.num_labels == 1
    return "regression" if silent or config.problem_type == "regression" else "classification"


@torch.no_grad()
def scores(model: BertForSequenceClassification, data: LabelledData) -> np.ndarray:
    """Logits [N, num_labels] float32 of every example, in the order of the data."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    result = np.zeros((len(data), model.config.num_labels), dtype=np.float32)
    for rows, batch in data.in_order():
        result[rows] = model(batch.to(device), labels=None).logits.float().cpu().numpy()
    model.train(was_training)
    return result


def evaluate(model: BertForSequenceClassification, data: LabelledData) -> dict:
    """accuracy, precision, recall, f1, mcc and per_class; for regression pearson, spearman and mse."""
    logits = scores(model, data)
    if kind_of(model) == "regression":
        return metrics.regression(data.labels, logits[:, 0])
    return metrics.classification(data.labels, logits.argmax(-1), model.config.id2label)


def predict(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    truncate: bool = False,
    batch_size: int = 32,
) -> Iterator[dict]:
    """{"text", "label", "probability"} of every example, in order ("text_pair" too for pairs); for regression {"text",
    "value"}.

    Raises:
        ValueError: a text is longer than the model's positions and `truncate` is false.
    """
    ids, types = encode_texts(tokenizer, examples, model.config.max_position_embeddings, truncate)
    logits = torch.from_numpy(scores(model, LabelledData(ids, types, None, batch_size=batch_size, seed=0)))
    for example, row in zip(examples, logits, strict=True):
        answer = dict(zip(("text", "text_pair"), example.texts, strict=False))
        if kind_of(model) == "regression":
            yield answer | {"value": float(row[0])}
        else:
            best = int(row.argmax())
            yield answer | {"label": model.config.id2label[best], "probability": float(row.softmax(-1)[best])}
