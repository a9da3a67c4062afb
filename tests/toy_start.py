"""A directory to fine-tune from: an encoder of random weights that knows a handful of words."""

import json
from pathlib import Path

import torch

from minibert import BertConfig, BertForPreTraining, Tokenizer

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def toy_tokenizer(words: str) -> Tokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words.split())]
    return Tokenizer.from_vocab({piece: i for i, piece in enumerate(pieces)})


def toy_start(directory, words: str, **changes) -> Path:
    """`directory`, with config, weights and tokenizer; dropout is off."""
    tokenizer = toy_tokenizer(words)
    torch.manual_seed(0)
    config = BertConfig(**{"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32} | SMALL | OFF | changes)
    BertForPreTraining(config).save_pretrained(directory, tokenizer)
    return Path(directory)


def write_jsonl(path, rows) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
