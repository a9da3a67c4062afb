"""What the two READMEs tell people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from minibert import BertConfig, BertForSequenceClassification, Tokenizer
from minibert.cli import VERBS, build_parser
from minibert.demo import REVIEWS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def saved_model(tmp_path, monkeypatch):
    """A toy classifier where the demo leaves its own."""
    tokenizer = Tokenizer.train([REVIEWS.read_text(encoding="utf-8")], 500)
    config = BertConfig.preset("bert-tiny", vocab_size=tokenizer.vocab_size, id2label=("negative", "positive"))
    BertForSequenceClassification(config).save_pretrained(tmp_path / "runs/demo/saved", tokenizer)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_the_python_of_the_readme_runs(number, saved_model, capsys):
    names = {}
    exec(compile(blocks(README, "python")[number], "README.md", "exec"), names)
    if "probabilities" in names:
        assert names["probabilities"].shape == (2, 2)
        assert len(capsys.readouterr().out.splitlines()) == 2
    else:
        assert type(names["model"].encoder.layers[0].ffn).__name__ == "ReluSquared"


def test_the_python_of_the_kernels_readme_runs():
    names = {}
    for example in blocks((ROOT / "kernels/README.md").read_text(encoding="utf-8"), "python"):
        exec(compile(example, "kernels/README.md", "exec"), names)
    assert names["packed"].equal(names["x"])


def test_every_minibert_command_of_the_readme_parses():
    lines = [line for block in blocks(README, "console") for line in block.splitlines()]
    commands = [shlex.split(line[line.index("minibert ") :], comments=True) for line in lines if "minibert " in line]
    assert len(commands) >= 8
    for _, verb, *rest in commands:
        assert verb in VERBS
        assert build_parser(verb).parse_args(rest) is not None


def test_every_file_of_the_tree_in_the_readme_exists():
    [tree] = re.findall(r"## What lies where\n\n```\n(.*?)```", README, re.DOTALL)
    folder, named = ROOT, []
    for line in tree.splitlines():
        for name in line[: 28 if line.startswith("  ") else 60].split("  ")[0 if not line.startswith("  ") else 1 :]:
            path = (folder if line.startswith("  ") else ROOT) / name.strip()
            if re.fullmatch(r"[\w./]+", name.strip()):
                named.append(path)
        if not line.startswith("  "):
            folder = ROOT / line.split()[0]
    assert len(named) > 15
    assert [path for path in named if not path.exists()] == []
