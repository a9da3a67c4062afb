"""Every command and every line of Python in docs/finetuning.md and docs/new-task.md runs, on small data of its own."""

import dataclasses
import json
import random
import shlex

import pytest
from test_readme import ROOT, blocks, console, minibert_commands
from toy_start import toy_start, write_jsonl

from benchmarks import finetuning
from benchmarks.__main__ import main as benchmarks
from minibert.cli import main
from minibert.data.sources import find_splits
from minibert.demo import REVIEWS
from minibert.tasks import TASKS

FINETUNING = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
NEW_TASK = (ROOT / "docs/new-task.md").read_text(encoding="utf-8")
WORDS = "ada lovelace lived in london . the cat sees a moon who which one is red ? i love it good bad lamp broke"
SMALL = "--steps 2 --batch-size 4 --device cpu"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def published(folder):
    """A few records in the form of each published set that the page names."""
    draw, texts = random.Random(0), ["the cat sees a moon", "ada lived in london", "i love the lamp", "it broke"]
    lines = REVIEWS.read_text(encoding="utf-8").splitlines()
    write(folder / "reviews.csv", "\n".join([lines[0], *draw.sample(lines[1:], 40)]) + "\n")
    write(folder / "texts.txt", "I love it\nIt broke\n")
    for split in ("train", "dev"):
        write(
            folder / f"SST-2/{split}.tsv", "sentence\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(texts))
        )
        pairs = "".join(f"{a}\t{b}\t{(i + j) % 6}\n" for i, a in enumerate(texts) for j, b in enumerate(texts))
        write(folder / f"STS-B/{split}.tsv", "sentence1\tsentence2\tscore\n" + pairs)
    intents = [[text, ("ask", "tell")[i % 2]] for i, text in enumerate(texts)]
    none = [["the moon", "oos"]]
    clinc = {"train": intents, "oos_train": none, "val": intents, "oos_val": none, "test": intents, "oos_test": none}
    write(folder / "clinc150.json", json.dumps(clinc))
    topics = "".join(f"{text},{'|'.join(draw.sample(['a', 'b', 'c'], i % 3))}\n" for i, text in enumerate(texts * 5))
    write(folder / "topics.csv", "text,labels\n" + topics)
    conll = "Ada NNP B-NP B-PER\nlived VBD B-VP O\nin IN B-PP O\nLondon NNP B-NP B-LOC\n. . O O\n\n" * 3
    for split in ("train", "valid", "test"):
        write(folder / f"conll2003/{split}.txt", "-DOCSTART- -X- O O\n\n" + conll)
        write(folder / f"snips/{split}/seq.in", "ada lived in london\nthe cat sees\n" * 3)
        write(folder / f"snips/{split}/seq.out", "B-name O O B-city\nO B-pet O\n" * 3)
        write(folder / f"snips/{split}/label", "Where\nWho\n" * 3)
    relation = '{}\t"<e1>Ada</e1> lived in <e2>London</e2>."\n{}\nComment:\n\n'
    names = ["In(e1,e2)", "In(e2,e1)", "Other"]
    for split in ("train", "test"):
        write(folder / f"semeval2010_task8/{split}.txt", "".join(relation.format(i, names[i % 3]) for i in range(30)))
    asked = [
        {"id": f"q{i}", "question": "who lived", "answers": [{"text": "Ada", "answer_start": 0}]} for i in range(20)
    ]
    articles = [
        {"title": str(i), "paragraphs": [{"context": "Ada lived in London.", "qas": asked[i::4]}]} for i in range(4)
    ]
    write(folder / "squad.json", json.dumps({"version": "1.1", "data": articles}))
    chosen = {"question": "Which one is red?", "choices": ["the moon", "a cat", "the lamp"]}
    write_jsonl(folder / "choices.jsonl", [chosen | {"label": i % 3} for i in range(20)])
    news = {"document": "The cat sees. Ada lived in London. A moon!", "summary": "Ada lived."}
    write_jsonl(folder / "news.jsonl", [news] * 20)
    write_jsonl(
        folder / "pairs.jsonl", [{"sentence1": a, "sentence2": b} for a, b in zip(texts * 5, texts * 5, strict=True)]
    )
    headlines = [{"headline": t, "article": texts[i % 3], "fits": i % 3 == i % 4} for i, t in enumerate(texts * 5)]
    write_jsonl(folder / "headlines.jsonl", headlines)


def labelled(folder):
    """The folder of sets that the benchmarks take, with those of `published` and the others; and a corpus."""
    for split in ("train", "dev"):
        write(folder / f"labelled/glue/CoLA/{split}.tsv", "".join(f"s\t{i % 2}\t\tthe cat sees\n" for i in range(8)))
        follows = "".join(f"{i}\tada lived\tada\t{'not_' * (i % 2)}entailment\n" for i in range(8))
        write(folder / f"labelled/glue/RTE/{split}.tsv", "index\tsentence1\tsentence2\tlabel\n" + follows)
    for split in ("train", "test"):
        asked = "".join(f"who is in the {('moon', 'lamp')[i % 2]}?,{'ab'[i % 2]}\n" for i in range(30))
        write(folder / f"labelled/banking77/{split}.csv", "text,category\n" + asked)
    for there, name in {
        "glue/SST-2": "SST-2", "glue/STS-B": "STS-B", "snips": "snips", "semeval2010_task8": "semeval2010_task8",
        "clinc150/data_full.json": "clinc150.json", "squad/dev-v1.1.rebuilt.json": "squad.json",
    }.items():  # fmt: skip
        link = folder / "labelled" / there
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / name)
    article = (
        '<doc id="{0}" title="Cat">\nCat\n\n' + "The cat sees a moon. " * 12 + "\n" + "A red lamp. " * 9 + "\n</doc>\n"
    )
    write(folder / "wikipedia/wiki_00", "".join(map(article.format, range(12))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    published(folder)
    labelled(folder)
    letters = " ".join(f"{c} ##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-:")
    toy_start(
        folder / "runs/tiny", f"{WORDS} {letters}", max_position_embeddings=256, hidden_size=24, num_hidden_layers=1
    )
    (folder / "all-MiniLM-L6-v2").symlink_to("runs/tiny")
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """The folder after every command of the page, in order, at small size; and what each printed is thrown away."""
    pytest.importorskip("rouge_score")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in minibert_commands(FINETUNING):
            small = SMALL.split() if command[0] == "finetune" else ["--device", "cpu"]
            assert main([*command, *small]) == 0, command
    return folder


def test_every_command_about_finetuning_runs(runs):
    commands = [command for command in minibert_commands(FINETUNING) if "--task" in command]
    assert {command[command.index("--task") + 1] for command in commands} == set(TASKS)
    for command in commands:
        assert (runs / command[command.index("--out") + 1] / "results.json").is_file()
    assert len((runs / "answers.jsonl").read_text().splitlines()) == 40
    cells = json.loads((runs / "runs/five/runs.json").read_text())["cells"]
    assert [cell["runs"] for cell in cells] == [["seed-0", "seed-1"]]


def test_every_command_that_made_a_table_runs(folder, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    monkeypatch.chdir(folder)
    lines = [line.split("-m benchmarks")[1] for line in console(FINETUNING) if "-m benchmarks" in line]
    for line in lines:
        assert benchmarks([*shlex.split(line), "--seeds", "2", "--out", "records"]) == 0
    assert "left out" not in capsys.readouterr().err
    records = [json.loads(file.read_text()) for file in folder.glob("records/*.json")]
    assert len(records) == len(lines)
    assert {row["case"] for record in records for row in record["rows"]} == {*finetuning.LINES}


def test_the_python_about_finetuning_runs(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    names = {}
    for example in blocks(FINETUNING, "python"):
        exec(compile(example, "docs/finetuning.md", "exec"), names)
    assert (runs / "by-hand/model.safetensors").is_file() and names["answer"]["text"] == "It broke\n"
    assert names["result"].step == 1 and len(capsys.readouterr().out.splitlines()) > 6


def test_the_page_names_every_task_and_every_option():
    learned = {"num_choices", "may_be_none", "intents", "texts"}  # from the examples, by the task itself
    for name, kind in TASKS.items():
        assert f"| `{name}` |" in FINETUNING, name
        for field in {field.name for field in dataclasses.fields(kind)} - learned:
            assert f"`{field}`" in FINETUNING or f"`--{field.replace('_', '-')}`" in FINETUNING, (name, field)


def test_a_new_task_is_learned_evaluated_and_used(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    try:
        for example in blocks(NEW_TASK, "python"):
            exec(compile(example, "docs/new-task.md", "exec"), names)
    finally:
        TASKS.pop("headline", None)
    out = capsys.readouterr().out
    assert (folder / "runs/headlines/results.json").is_file() and "accuracy" in out and "'headline': 'It rains'" in out


def test_the_data_of_this_file_has_the_forms_that_it_says(folder):
    assert set(find_splits(folder / "clinc150.json")) == {"train", "valid", "test"}
    [first, *_] = find_splits(folder / "conll2003")["train"].records()
    assert first.fields["tags"][0] == "B-PER"
