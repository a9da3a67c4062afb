"""`minibert prepare`: what it prints and writes, and its page of documentation."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from minibert.cli import main
from minibert.data import TokenStore

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]

TINY = "--arch.hidden_size 16 --arch.num_attention_heads 2 --arch.intermediate_size 16 --max-length 32"


def run(command: str) -> int:
    return main(command.split())


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """What the page takes for granted: corpus/ and books/ with text in several formats, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for folder, things in (("corpus", ("boat", "lamp", "tree")), ("books", ("hat", "cup", "road"))):
        Path(folder).mkdir()
        for i in range(5):
            rows = [
                f"The {things[(i + k) % 3]} number {k * i} is <b>here</b>. Who saw the {things[k % 3]}? We did not."
                for k in range(30)
            ]
            (Path(folder) / f"{i}.txt").write_text("\n\n".join(rows))
            lines = [json.dumps({"text": f"{row}\nAnd it was {i + k} again."}) for k, row in enumerate(rows)]
            (Path(folder) / f"{i}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_commands_of_the_page_run_one_after_the_other(corpus, capsys):
    pytest.importorskip("rensa", reason="needs the package rensa")
    pytest.importorskip("matplotlib")
    assert len(COMMANDS) >= 8 and {command[0] for command in COMMANDS} == {"minibert"}
    for _, verb, *rest in COMMANDS:
        if verb == "pretrain":
            rest += f"--steps 2 --batch-tokens 256 {TINY}".split()
        assert main([verb, *rest]) == 0, (verb, rest, capsys.readouterr().err)


def test_the_report_is_printed_and_kept(corpus, capsys):
    command = "prepare --data corpus --out store --vocab-size 200 --dedup --clean --min-words 8 --valid 0.1 --test 0.1"
    assert run(command) == 0
    printed = capsys.readouterr().err
    report = json.loads((corpus / "store/report.json").read_text())
    assert set(report["stores"]) == {"train", "valid", "test"} and report["left_out"]["duplicates"] > 0
    for name, part in report["stores"].items():
        assert TokenStore(corpus / "store" / name).num_documents == part["documents"]
        assert f"store/{name}: {part['documents']:,} documents" in printed
    assert f"left out: {report['left_out']['duplicates']:,} duplicates" in printed


def test_pretraining_learns_from_one_side_of_a_split_and_is_measured_on_the_other(corpus):
    assert run("prepare --data corpus --out store --vocab-size 200 --valid 0.2") == 0
    (corpus / "store/valid/tokens.bin").rename(corpus / "away")
    command = f"pretrain --data store --out run --steps 2 --batch-tokens 128 {TINY}"
    assert run(command) == 2  # the held-out side is broken, and needed
    (corpus / "away").rename(corpus / "store/valid/tokens.bin")
    assert run(command) == 0


def test_a_weighted_mixture_of_stores_resumes_bit_for_bit(corpus):
    assert run("tokenizer --data corpus books --out tokenizer --vocab-size 200") == 0
    assert run("prepare --data corpus --out a --tokenizer tokenizer --valid 0.2") == 0
    assert run("prepare --data books --out b --tokenizer tokenizer") == 0
    command = f"pretrain --data a b --mix 0.7 0.3 --batch-tokens 256 --save-every 3 {TINY}"
    assert run(f"{command} --steps 6 --out straight") == 0
    assert run(f"{command} --steps 6 --out resumed") == 0
    for path in (corpus / "resumed").glob("step-6"):
        shutil.rmtree(path)
    assert run(f"{command} --steps 6 --out resumed --resume") == 0
    weights = [(corpus / name / "step-6/model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]
    assert run(f"{command.replace('0.7 0.3', '0.6 0.4')} --steps 6 --out resumed --resume") == 2


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--data a a --mix 0.5", "--mix gives 1 weights for 2 stores in --data"),
        ("--data a corpus --mix 0.5 0.5", "--mix weighs token stores: prepare corpus first"),
        ("--data a c --mix 0.5 0.5", "c was built with another tokenizer than a"),
        ("--data a a --mix 0.5 -1", "not all positive"),
    ],
)
def test_a_mixture_that_is_none_is_refused(options, expected, corpus, capsys):
    for out, size in (("a", 200), ("c", 150)):
        assert run(f"prepare --data corpus --out {out} --vocab-size {size}") == 0
    assert run(f"pretrain {options} --out run --steps 2 {TINY}") == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (corpus / "run").exists()


def test_a_picture_is_drawn_also_later_and_one_line_says_which_package_is_missing(corpus, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = "prepare --data corpus --out store --vocab-size 200 --valid 0.2"
    assert run(command) == 0 and not (corpus / "store/lengths.png").exists()
    assert run(f"{command} --picture") == 0
    assert (corpus / "store/lengths.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("prepare --data corpus --out other --picture") == 2
    assert "pip install 'minibert[viz]'" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert run("prepare --data corpus --out other --near-dedup 0.8") == 2
    assert "pip install 'minibert[data]'" in capsys.readouterr().err.splitlines()[-1]
    assert not (corpus / "other").exists()


BAD = {
    "nothing to prepare": ("", "name text with --data, or shards with --merge"),
    "a broken row": ("--data {dir}/bad.jsonl --tokenizer {dir}/tokenizer", "bad.jsonl:2: column 'text' holds int"),
    "a share out of range": ("--data {dir}/corpus --valid 1.5", "valid=1.5 is not in [0, 1)"),
    "an unknown policy": ("--data {dir}/corpus --on-bad-record ignore", "is not one of fail, skip"),
    "a shard that is no fraction": ("--data {dir}/corpus --shard 2", "shard='2' is not i/n, as 2/8"),
    "a shard out of range": (
        "--data {dir}/corpus --shard 3/2 --tokenizer {dir}/tokenizer",
        "shard 3/2: the first number is in 1 to 2",
    ),
    "a picture of a shard": ("--data {dir}/corpus --shard 1/2 --picture", "leave --picture to --merge"),
    "a shard without a tokenizer": ("--data {dir}/corpus --shard 1/2", "--shard needs --tokenizer"),
    "a merge with options": ("--merge a b --dedup --data c", "leave out data, dedup"),
    "a merge of nothing": ("--merge {dir}/corpus", "corpus is no finished shard"),
    "no workers": ("--data {dir}/corpus --workers 0", "workers=0 is not positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_prepare_is_one_line_and_exit_code_2(name, corpus, capsys):
    assert run("tokenizer --data corpus --out tokenizer --vocab-size 200") == 0
    (corpus / "bad.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    options, expected = BAD[name]
    before = set(corpus.iterdir())
    capsys.readouterr()
    assert run(f"prepare --out {corpus / 'out'} {options.format(dir=corpus)}") == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("minibert: error: ") and expected in error
    assert set(corpus.iterdir()) == before


def test_broken_rows_may_be_left_out_of_tokenizer_and_store(corpus):
    (corpus / "bad.jsonl").write_text('{"text": "the boat is here"}\n{"text": 7}\n\n{"text": "the lamp"}\n{')
    assert run("prepare --data bad.jsonl --out out --vocab-size 100 --on-bad-record skip") == 0
    assert json.loads((corpus / "out/report.json").read_text())["left_out"] == {"bad records": 2}
