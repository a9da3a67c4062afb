"""A model small enough for a test, with sizes that no two axes share, and batches for it."""

import dataclasses

import pytest
import torch

from minibert.batch import IGNORE, Batch, pack_padded
from minibert.config import BertConfig
from minibert.data.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 19,
}
LENGTHS = (7, 1, 5, 3, 7)
TEXT = "the cat sat on a mat . dogs bark at night and birds sing ! why ? ##s ##ing play"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
TOKENIZER = Tokenizer.from_vocab({piece: i for i, piece in enumerate(PIECES)})
REQUIRED = {"BertForJointClassification": {"task_specific_params": {"intents": ["ask", "tell", "go", "stay"]}}}


def small_config(**changes) -> BertConfig:
    """Weights are drawn wide, so that states differ by more than rounding."""
    return BertConfig(**SIZES | {"initializer_range": 0.3} | changes)


def build(kind, seed: int = 0, *, train: bool = False, backend: str = "auto", **changes):
    """A model of the class `kind` with random biases too; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = kind(small_config(**REQUIRED.get(kind.objective, {}) | changes), backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.train(train)


def padded(lengths=LENGTHS, width: int | None = None, seed: int = 1, left: bool = False) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and token_type_ids [B, S]; padding holds ids that would be seen if it were read."""
    width = max(lengths) if width is None else width
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]
    ids, mask, types = (torch.full((len(lengths), width), fill) for fill in (13, 0, 0))
    for row, tokens in enumerate(rows):
        there = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, there], mask[row, there] = tokens, 1
        types[row, there] = (torch.arange(len(tokens)) > len(tokens) // 2).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def mlm_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S]: every third token, counted from the first column, is to be predicted."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    chosen = mask & (torch.arange(ids.shape[1]) % 3 == 0)
    return torch.where(chosen, (ids + 5) % SIZES["vocab_size"], IGNORE)


def packed(inputs: dict[str, torch.Tensor]):
    return pack_padded(**inputs)[0]


def with_ends(batch: Batch) -> Batch:
    """The batch with the first and the last token of each sequence as `token_rows`."""
    cu_seqlens = batch.cu_seqlens.long()
    return dataclasses.replace(batch, token_rows=torch.stack([cu_seqlens[:-1], cu_seqlens[1:] - 1], 1).flatten())


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refused(call) -> str:
    """The message of the ValueError that `call` raises, which is one line."""
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
