"""A model of a few thousand weights that learns a toy set through the verbs, in seconds."""

import json

import torch

from minibert.cli import main
from minibert.config import BertConfig
from minibert.data.tokenizer import Tokenizer
from minibert.model import BertModel

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_tokenizer(*words) -> Tokenizer:
    """A vocabulary of these words, and of the letters and signs that ASCII has, at a word's start and within."""
    signs = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    pieces = dict.fromkeys([*SPECIAL, *words, *signs, *(f"##{c}" for c in signs)])
    return Tokenizer.from_vocab({piece: i for i, piece in enumerate(pieces)})


def save_weights(path, tokenizer: Tokenizer, positions: int = 40):
    """New weights and their tokenizer, as a directory that `--init` takes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=positions, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def finetune(task: str, data, init, out, **flags) -> dict:
    """`results.json` of a run through the command line."""
    given = {"epochs": 20, "lr": 1e-2, "batch_size": 16, "device": "cpu", "log_every": 50} | flags
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", *str(value).split())]
    words = ["finetune", "--task", task, "--data", str(data), "--init", str(init), "--out", str(out), *words]
    assert main(words) == 0
    return json.loads((out / "results.json").read_text())


def say(capsys, *words) -> dict:
    """What a verb prints with --json."""
    capsys.readouterr()
    assert main([*map(str, words), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)
