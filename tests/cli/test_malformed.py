"""Files as people have them, broken in every way that was thought of: one line names file, line and field, and no run
is begun; and what becomes of single records where they may be left out."""

import json

import pytest

from minibert.cli import main
from minibert.data.sources import Source

HEAD = "text,label\nthe cat sat,y\ndogs bark,n\n"
GOOD = HEAD + "birds sing,y\nwhy ?,n\n" * 3


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXT, TAGS = {"text": "the cat", "label": "y"}, {"tokens": ["the", "cat"], "tags": ["O", "B-pet"]}
ASKED = {"id": "a", "question": "why ?", "context": "the cat sat", "answers": {"text": ["cat"], "answer_start": [4]}}
CHOICE = {"question": "why ?", "choices": ["the cat", "dogs"], "label": 0}
MARKED = {"text": "<e1>the cat</e1> and <e2>dogs</e2>", "label": "y"}
NEWS = {"document": "the cat sat. dogs bark.", "summary": "dogs bark."}

# what is wrong: the task, the files in the order train, valid, and what is said behind the name of the last of them
MALFORMED = {
    "wrong columns": ("classification", {"a.csv": "txt,lable\na,y\n"}, ":2: its columns are txt, lable: name the text"),
    "no column of labels": ("classification", {"a.csv": "text,n\na,1\n"}, ":2: it has no label: name its column with"),
    "too many fields": ("classification", {"a.csv": HEAD + "a,b,y\n"}, ":4: 3 fields, the header has 2"),
    "too few fields": ("classification", {"a.csv": HEAD + "a\n"}, ":4: 1 fields, the header has 2"),
    "unknown label": (
        "classification", {"a.csv": GOOD, "b.csv": HEAD + "why ?,neutral\n"}, ":4: label='neutral' is not one of n, y",
    ),
    "unknown label among several": (
        "multilabel", {"a.csv": GOOD, "b.csv": HEAD + "why ?,y|z\n"}, ":4: labels='z' is not one of n, y",
    ),
    "class missing in train": (
        "classification", {"a.csv": "text,label\na,y\nb,y\n"}, ": every label is 'y': two classes are needed",
    ),
    "a tag too few": ("ner", {"a.jsonl": lines(TAGS, TAGS | {"tags": ["O"]})}, ":2: 2 tokens and 1 tags"),
    "no tag": ("ner", {"a.jsonl": lines(TAGS, TAGS | {"tags": ["O", "pet"]})}, ":2: tag 'pet' is not one of O, B-…"),
    "unknown tag": (
        "ner", {"a.jsonl": lines(TAGS), "b.jsonl": lines(TAGS, TAGS | {"tags": ["O", "B-man"]})},
        ":2: tags='B-man' is not one of B-pet, O",
    ),
    "no tokens": ("ner", {"a.jsonl": lines(TAGS, TEXT | {"tags": ["O", "O"]})}, ":2: tokens=None is not a list of"),
    "no tags": ("ner", {"a.csv": GOOD}, ":2: it has no tags"),
    "answer not in context": (
        "qa", {"a.jsonl": lines(ASKED, ASKED | {"id": "b", "answers": {"text": ["cat"], "answer_start": [5]}})},
        ":2: answers: 'cat' does not stand at 5 of the context",
    ),
    "duplicate ids": ("qa", {"a.jsonl": lines(ASKED, ASKED)}, ":2: id='a' is the id of an earlier record, too"),
    "empty text": ("classification", {"a.csv": HEAD + ",y\n"}, ":4: text='' is not a text"),
    "blank text": ("classification", {"a.csv": HEAD + " \t,y\n"}, ":4: text=' \\t' is not a text"),
    "text is a number": ("classification", {"a.jsonl": lines(TEXT, TEXT | {"text": 5})}, ":2: text=5 is not a text"),
    "label is a bool": ("classification", {"a.jsonl": lines(TEXT, TEXT | {"label": True})}, ":2: label=True is not a"),
    "mixed types": (
        "classification", {"a.jsonl": lines(TEXT, TEXT, TEXT | {"label": 3})}, ":3: label=3 is a number, those before",
    ),
    "mixed types in relations": (
        "relation", {"a.jsonl": lines(MARKED, MARKED | {"label": 3})}, ":2: label=3 is a number, those before",
    ),
    "label is no number": ("regression", {"a.csv": HEAD}, ":2: label='y' is not a number, which regression needs"),
    "entities are not marked": ("relation", {"a.jsonl": lines(MARKED, TEXT)}, ":2: text='the cat' does not mark <e1>"),
    "empty file": ("classification", {"a.csv": ""}, ": it holds no records"),
    "empty valid split": ("classification", {"a.csv": GOOD, "b.csv": "text,label\n"}, ": it holds no records"),
    "broken json": ("classification", {"a.jsonl": lines(TEXT, TEXT) + '{"text": \n'}, ":3: broken JSON, expected one"),
    "latin-1": ("classification", {"a.csv": (HEAD + "caf\xe9,y\n").encode("latin-1")}, ":4: byte 0xe9 is not UTF-8"),
    "utf-16": ("classification", {"a.csv": GOOD.encode("utf-16")}, ":1: byte 0xff is not UTF-8"),
    "NUL": ("classification", {"a.csv": HEAD + "a\0b,y\n"}, ":4: text='a\\x00b' is not a text"),
    "half a pair": ("classification", {"a.jsonl": lines(TEXT, TEXT | {"text": "\ud83d"})}, ":2: text='\\ud83d' is not"),
    # half a megabyte: a line of ten is read in tests/data/test_records.py, here its words would take seconds to count
    "long line": ("classification", {"a.csv": HEAD + "dogs " * 100_000 + ",y\n"}, ":4: the text has 100002 tokens,"),
    "stray quote": (
        "classification", {"a.csv": HEAD + '"why ?,y\n' + "birds sing,n\n" * 97},
        ":4: unexpected end of data, 98 lines were read as one row: is there a stray quotation mark?",
    ),
    "missing summary": ("summary", {"a.jsonl": lines({"document": NEWS["document"]})}, ":1: it has no summary or"),
    "odd number of choices": (
        "choice", {"a.jsonl": lines(CHOICE, CHOICE | {"choices": ["the cat", "dogs", "birds"]})},
        ":2: choices has 3 texts, the first question 2",
    ),
    "odd number of choices held out": (
        "choice", {"a.jsonl": lines(CHOICE), "b.jsonl": lines(CHOICE | {"choices": ["the cat", "dogs", "birds"]})},
        ":1: choices has 3 texts, expected 2",
    ),
    "no such choice": ("choice", {"a.jsonl": lines(CHOICE, CHOICE | {"label": 2})}, ":2: label=2 is not the number of"),
    "one text of a pair": (
        "embedding", {"a.jsonl": lines(*[{"text": "the cat", "score": 1}] * 2)}, ":1: one text: vectors are learned",
    ),
}  # fmt: skip


@pytest.fixture
def run(weights, tmp_path, capsys):
    """Runs `minibert finetune` on files with these contents: its exit code, what it said on stderr, and the paths."""

    def finetune(task, files, *flags):
        paths = [tmp_path / name for name in files]
        for path, content in zip(paths, files.values(), strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        given = [word for flag, path in zip(("--train", "--valid"), paths, strict=False) for word in (flag, str(path))]
        out = ["--init", str(weights), "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
        code = main(["finetune", "--task", task, *given, *out, *flags])
        return code, capsys.readouterr().err.splitlines(), paths

    finetune.out = tmp_path / "run"
    return finetune


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_one_line_that_names_it_and_begins_no_run(name, run):
    task, files, message = MALFORMED[name]
    code, said, paths = run(task, files)
    assert code == 2 and said == [said[-1]] and said[-1].startswith(f"minibert: error: {paths[-1]}{message}")
    assert not run.out.exists()


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["no mark", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_byte_order_mark_and_windows_line_ends_are_not_malformed(start, end, run):
    code, said, [path] = run("classification", {"a.csv": start + GOOD.replace("\n", end)}, "--valid-fraction", "0.25")
    assert code == 0, said
    plain = path.with_name("plain.csv")
    plain.write_text(GOOD)
    assert [r.fields for r in Source((path,)).records()] == [r.fields for r in Source((plain,)).records()]


BROKEN = {
    "classification": ({"a.csv": GOOD + "a,b,c\n,y\n", "b.csv": HEAD + "why ?,neutral\nwhy ?,n\n"}, 3),
    "ner": (
        {
            "a.jsonl": lines(*[TAGS] * 4, TAGS | {"tags": ["O"]}) + "{\n",
            "b.jsonl": lines(TAGS, TAGS | {"tags": ["O", "B-man"]}, TAGS | {"tokens": []}),
        },
        4,
    ),
    "qa": ({"a.jsonl": lines(ASKED, ASKED), "b.jsonl": lines(ASKED, ASKED | {"context": "dogs"}, 3)}, 3),
    "choice": ({"a.jsonl": lines(CHOICE, CHOICE), "b.jsonl": lines(CHOICE, CHOICE | {"choices": ["a", "b", "c"]})}, 1),
}


@pytest.mark.parametrize("task", BROKEN)
def test_records_that_cannot_be_used_end_the_command_or_are_counted_or_named(task, run, capsys):
    files, count = BROKEN[task]
    code, said, paths = run(task, files)
    assert code == 2 and len(said) == 1 and not run.out.exists()
    total = f"{count} records could not be used and were left out"
    for mode in ("skip", "report"):
        code, said, paths = run(task, files, "--on-bad-record", mode, "--out", str(run.out / mode))
        named = [line for line in said if line.startswith(tuple(f"{path}:" for path in paths))]
        assert code == 0 and said.count(total) == 1 and len(named) == (count if mode == "report" else 0), said
    held = [line for line in named if line.startswith(f"{paths[1]}:")]
    for mode, lines_said in (("skip", 1), ("report", 1 + len(held))):
        measure = ["evaluate", "--model", str(run.out / "skip"), "--data", str(paths[1]), "--on-bad-record", mode]
        assert main([*measure, "--device", "cpu"]) == 0
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines_said and said[-1] == f"{len(held)} records could not be used and were left out"
        assert said[:-1] == (held if mode == "report" else [])
    assert main([*measure[:-1], "fail", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"minibert: error: {held[0]}\n"


def test_no_record_of_a_file_with_a_stray_quotation_mark_is_scored(run, capsys):
    """Half a file that is measured as if it were all of it is worse than none."""
    run("classification", {"a.csv": GOOD}, "--valid-fraction", "0.25")
    path = run.out.parent / "b.csv"
    path.write_text(HEAD + '"why ?,y\n' + "birds sing,n\n" * 97)
    for mode in ("skip", "report"):
        assert main(["evaluate", "--model", str(run.out), "--data", str(path), "--on-bad-record", mode]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"minibert: error: {path}:4: unexpected end of data, 98 lines were read as one row")
