"""What docs/training-help.md tells people to type works."""

import csv
import json
from pathlib import Path

import pytest
import torch
from small import SIZES
from test_readme import ROOT, minibert_commands

from minibert import BertConfig, BertForPreTraining, Tokenizer
from minibert.cli import main
from minibert.demo import REVIEWS

COMMANDS = minibert_commands((ROOT / "docs/training-help.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 120 reviews and weights that were never trained."""
    folder = tmp_path_factory.mktemp("help")
    with open(REVIEWS, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[:121]
    with open(folder / "reviews.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    tokenizer = Tokenizer.train([REVIEWS.read_text(encoding="utf-8")], 300)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size}
    BertForPreTraining(BertConfig(**sizes)).save_pretrained(folder / "runs/tiny", tokenizer)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[6]).name)
def test_the_command_runs(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if "--learning-curve" in command:
        pytest.importorskip("matplotlib")
    assert main([*command, "--truncate", "--device", "cpu"]) == 0
    out = Path(command[command.index("--out") + 1])
    found = out / "runs.json" if (out / "runs.json").is_file() else out / "results.json"
    assert json.loads(found.read_text())
