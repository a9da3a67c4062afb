"""What the READMEs and docs/ tell people to type works."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import arguments
from minibert import BertConfig, BertForPreTraining, BertForSequenceClassification, Tokenizer
from minibert.cli import VERBS, build_parser, main
from minibert.demo import REVIEWS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPLAINING = (ROOT / "docs/explaining.md").read_text(encoding="utf-8")
PROFILING = (ROOT / "docs/profiling.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "kernels/README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("make ", "pip install ", "nsys stats ", "proton-viewer ")  # what neither minibert nor Python runs


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def console(text: str) -> list[str]:
    """The commands; one may go on in the next line, behind a backslash."""
    return [line for block in blocks(text, "console") for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def minibert_commands(text: str) -> list[list[str]]:
    """Verb and arguments of every `minibert …`, whatever program it is run under."""
    lines = [line[line.index("minibert ") :] for line in console(text) if "minibert " in line]
    return [shlex.split(line, comments=True)[1:] for line in lines]


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
    elif "states" in names:
        padding = names["texts"]["attention_mask"] == 0
        assert names["states"].shape[::2] == (2, names["model"].config.hidden_size)
        assert padding.any() and not names["states"][padding].any()
    else:
        assert type(names["model"].encoder.layers[0].ffn).__name__ == "ReluSquared"


def test_the_python_of_the_kernels_readme_runs():
    names = {}
    for example in blocks((ROOT / "kernels/README.md").read_text(encoding="utf-8"), "python"):
        exec(compile(example, "kernels/README.md", "exec"), names)
    assert names["packed"].equal(names["x"])


@pytest.mark.parametrize(("document", "least"), [("README.md", 8), ("docs/profiling.md", 7)])
def test_the_documents_hold_commands(document, least):
    assert len(minibert_commands((ROOT / document).read_text(encoding="utf-8"))) >= least


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_minibert_command_parses(document):
    for verb, *rest in minibert_commands(document.read_text(encoding="utf-8")):
        assert verb in VERBS
        assert build_parser(verb).parse_args(rest) is not None


def test_the_command_for_each_reader_parses():
    commands = re.findall(r"^\| .* \| `(.*)` \| .* \|$", README.split("## Two commands")[0], re.MULTILINE)
    kernels, architecture, benchmarks = map(shlex.split, commands)
    for program, verb, *rest in (kernels, architecture):
        assert program == "minibert" and build_parser(verb).parse_args(rest) is not None
    assert benchmarks[:3] == ["python", "-m", "benchmarks"] and arguments(benchmarks[3:]) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_benchmarks_parses(document):
    lines = [line for line in console(document.read_text(encoding="utf-8")) if "-m benchmarks" in line]
    assert lines or document.name != "benchmarks.md"
    for line in lines:
        assert arguments(shlex.split(line.split("-m benchmarks")[1], comments=True)) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_other_command_is_one_that_is_known(document):
    for line in console(document.read_text(encoding="utf-8")):
        if "minibert " not in line:
            module = re.match(r"python -m ([\w.]+)", line)
            assert importlib.util.find_spec(module[1]) if module else line.startswith(OTHERS), line


def test_every_document_that_a_readme_names_exists():
    for document in DOCUMENTS:
        for name in re.findall(r"`((?:docs|kernels)/\w+\.md)`", document.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), name


def test_the_commands_and_the_python_about_profiling_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = BertConfig.preset("bert-tiny", vocab_size=97, num_hidden_layers=1, id2label=("negative", "positive"))
    BertForSequenceClassification(config).save_pretrained("runs/reviews")
    small, vocabulary = "--batch-size 2 --length 8 --steps 1 --warmup 0 --device cpu", "--arch.vocab_size 97"
    commands = [command for command in minibert_commands(PROFILING) if "--tool" not in command]
    assert [command[0] for command in commands] == ["profile"] * 4
    for command in commands:
        preset = vocabulary.split() if "bert-tiny" in command else []
        assert main([*command, *small.split(), *preset]) == 0
    capsys.readouterr()
    for example in blocks(PROFILING, "python"):
        exec(compile(example, "docs/profiling.md", "exec"), {})
    memory, ops = capsys.readouterr().out.splitlines()
    assert re.match(r"\d+\.\d MB beside the weights, \d+\.\d ms into the steps; the largest: \[\d+", memory)
    assert ops.startswith("[('")


def test_the_commands_and_the_python_about_explaining_run(saved_model, capsys):
    pytest.importorskip("captum")
    tokenizer = Tokenizer.from_pretrained("runs/demo/saved")
    config = BertConfig.preset("bert-tiny", vocab_size=tokenizer.vocab_size)
    BertForPreTraining(config).save_pretrained("runs/tiny", tokenizer)
    Path("runs/reviews").symlink_to("demo/saved")
    commands = minibert_commands(EXPLAINING)
    assert [command[0] for command in commands] == ["explain"] * 4
    for command in commands:
        assert main([*command, "--steps", "2"]) == 0
    assert {path.name for path in Path().glob("*.html")} == {"page.html", "negative.html", "mask.html"}
    assert len(json.loads(capsys.readouterr().out)["explanations"]) == 1
    for example in blocks(EXPLAINING, "python"):
        exec(compile(example, "docs/explaining.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_ranges_and_kernels_that_the_recipes_choose_are_there():
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig.preset("bert-base"))
    ranges = re.findall(r'--nvtx-include "(.*)/"', PROFILING)
    assert ranges and set(ranges) <= {name for name, _ in model.named_modules()}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels/minibert_kernels").glob("*.py"))
    kernels, chosen = re.findall(r"def (\w+_kernel)\(\n", sources), re.findall(r"-k regex:(\S+)", PROFILING + README)
    assert chosen and all(any(re.search(pattern, kernel) for kernel in kernels) for pattern in chosen)


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
