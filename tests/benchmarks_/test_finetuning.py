"""The table of what fine-tuning reaches: made once, beside no learning and beside transformers."""

import json
from pathlib import Path

import pytest
from toy_start import toy_start, write_jsonl

from benchmarks import finetuning
from benchmarks.__main__ import main
from benchmarks.finetuning import Line, table, write_leads

RESULTS = Path(finetuning.__file__).parent / "results"
WORDS = "a the red blue cat dog sits runs here there now fast slow"
FLAGS = "--epochs 8 --lr 2e-3 --batch-size 4"


def sentence(number: int) -> list[str]:
    """Three to six words; the second tells the class, and the fourth is a slot where it is there."""
    return ["the", ("red", "blue")[number % 2], "cat", ("here", "there", "now")[number % 3], "a", "dog"][
        : 3 + number % 4
    ]


@pytest.fixture
def sets(tmp_path, monkeypatch):
    texts = {"train": range(24), "dev": range(24, 40)}
    for split, numbers in texts.items():
        rows = [{"text": " ".join(sentence(n)), "label": "ab"[n % 2]} for n in numbers]
        write_jsonl(tmp_path / "data" / "texts" / f"{split}.jsonl", rows)
        rows = [
            {"tokens": sentence(n), "tags": ["B-place" if i == 3 else "O" for i in range(len(sentence(n)))]}
            | {"label": "ab"[n % 2]}
            for n in numbers
        ]
        write_jsonl(tmp_path / "data" / "joint" / f"{split}.jsonl", rows)
    lines = {
        "texts": Line("texts", FLAGS, ("valid accuracy", "valid f1"), theirs=True),
        "joint": Line("joint", f"--task joint {FLAGS}", ("valid intent_accuracy", "valid f1"), theirs=True),
        "missing": Line("missing", FLAGS, ("valid accuracy",)),
    }
    monkeypatch.setattr(finetuning, "LINES", lines)
    init = toy_start(tmp_path / "init", WORDS, initializer_range=0.2)
    folders = {"data": tmp_path / "data", "init": init, "runs": tmp_path / "runs", "out": tmp_path / "record"}
    flags = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    return ["finetune", *flags, "--seeds", "2", "--dtype", "float32"]


def test_transformers_learns_the_same_from_the_same_weights_and_batches(sets, tmp_path, capsys):
    assert main(sets) == 0
    [file] = (tmp_path / "record").glob("*-finetune.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["texts", "joint"]
    assert "missing: left out: there is no" in capsys.readouterr().err
    for row in rows:
        for metric, number in row["numbers"].items():
            assert number["mean"] > 0.9
            assert row["theirs"][metric] == pytest.approx(number)  # there is no dropout
        assert row["step"]["ours"] > 0 and row["step"]["theirs"] > 0
    assert rows[0]["without"] == {"valid accuracy": 0.5}
    text = table(rows)
    assert f"| texts | `{FLAGS}` | 24 |" in text and "transformers" in text
    # nothing is made again
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*") if "beside" not in path.name
    }
    kept = tmp_path / "runs/texts/beside.json"
    beside = json.loads(kept.read_text())
    assert {part: len(found) for part, found in beside.items()} == {"without": 2, "theirs": 2, "step": 1}
    kept.write_text(json.dumps(beside | {"without": beside["without"][:1]}))  # as earlier versions left it
    assert main(sets) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads(kept.read_text()) == beside
    # other options have a record of their own
    first = file.read_text()
    assert main([*sets, "--only", "joint"]) == 0
    [other] = {*(tmp_path / "record").iterdir()} - {file}
    assert [row["case"] for row in json.loads(other.read_text())["rows"]] == ["joint"] and file.read_text() == first


def test_only_what_is_asked_for_is_made(sets, tmp_path, capsys):
    metrics = ("valid intent_accuracy",)
    finetuning.LINES["joint"] = Line("joint", "--task joint --steps 2", metrics)
    assert main([*sets, "--only", "joint"]) == 0
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["joint"]
    finetuning.LINES["joint"] = Line("joint", "--task joint --steps 3", metrics)
    with pytest.raises(SystemExit, match="2"):
        main(sets)
    said = capsys.readouterr().err
    assert "runs/joint was not made with" in said and "--steps 3" in said and "name another folder with" in said
    assert not (tmp_path / "runs/texts").exists()  # which would have come first


def test_the_minutes_of_a_run_are_those_of_all_its_processes(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"seconds": seconds} for seconds in (30, 60, 15, 45, 15)])
    assert finetuning.minutes(tmp_path) == 2


def test_one_seed_is_too_few(sets, capsys):
    with pytest.raises(SystemExit):
        main([*sets, "--seeds", "1"])
    assert "--seeds 1: a standard deviation needs two" in capsys.readouterr().err


def test_a_folder_without_any_set_is_an_error(sets, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([*sets, "--data", str(tmp_path / "empty")])
    assert "has none of the sets" in capsys.readouterr().err


def test_articles_become_bodies_with_their_first_paragraphs(tmp_path):
    lead, body = "A lead " * 40, "One sentence here. " * 12
    long, short = (
        f'<doc id="1" title="A">\nA\n\n{lead}\n{body}\n</doc>\n',
        '<doc id="2" title="B">\nB\n\nShort.\n</doc>\n',
    )
    (tmp_path / "wiki_00").write_text(long + short)
    write_leads(tmp_path / "wiki_00", tmp_path / "leads.jsonl")
    [row] = map(json.loads, (tmp_path / "leads.jsonl").read_text().splitlines())
    assert row["summary"] == lead.strip() and row["sentences"] == ["One sentence here."] * 12


def test_the_table_in_the_docs_is_that_of_the_record():
    text = (RESULTS.parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    files = sorted(RESULTS.glob("*-finetune*.json"))
    assert files
    for file in files:
        assert table(json.loads(file.read_text())["rows"]) in text, file
