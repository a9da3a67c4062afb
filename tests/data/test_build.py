"""Parts, splits, duplicates, shards and a build that is killed; what a plain store holds is in test_store."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minibert.data import PretrainingData, Tokenizer, TokenStore, build_store, merge_shards, parts, read_documents
from minibert.data.clean import document_key, normal_form

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Five files of three documents each; the last repeats documents of the first, in other case and blanks."""
    folder = tmp_path_factory.mktemp("texts")
    verbs, birds = ["sing", "play", "bark", "sat"], ["cat", "dogs", "birds", "mat", "night"]
    for f in range(4):
        documents = [f"The {birds[(f + d) % 5]} {verbs[(f * d) % 4]}. Why {f} {d}?\nA {birds[d]}." for d in range(3)]
        (folder / f"{f}.txt").write_text("\n\n".join(documents))
    first = (folder / "0.txt").read_text().split("\n\n")
    (folder / "4.txt").write_text(f"{first[1].upper()}\n\nThe mat.\n\n{first[0].replace(' ', '  ')}")
    return folder


def decoded(store):
    return [
        " ".join(store.tokenizer.decode(store.sentence(i)) for i in range(*store.document(d)))
        for d in range(store.num_documents)
    ]


def same_files(a, b, but=()):
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(str(p.relative_to(x)) for p in x.rglob("*") if p.is_file() and p.name not in but) for x in (a, b)]
    return names[0] == names[1] and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names[0])


def test_the_report_is_worked_out_by_hand(toy_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat. Dogs bark!\nWhy?\n\nzebra birds sing.\n\n\x01\n\nWhy?\n\nwhy ?")
    store = build_store(tmp_path / "a.txt", tmp_path / "out", toy_tokenizer, min_words=1, dedup=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # sentences of 4, 3, 2, 4 and 2 tokens (the last twice): documents of 9, 4 and 2
    assert report == {
        "files": 1,
        "stores": {
            "all": {
                "documents": 4,
                "sentences": 6,
                "tokens": 17,
                "unknown": 1,
                "characters": 52,
                "unknown_rate": round(1 / 17, 6),
                "tokens_of_a_sentence": {"2": 3, "3": 1, "4": 2},
                "tokens_of_a_document": {"2": 2, "3": 0, "4": 1, "6": 0, "8": 0, "12": 1},
            }
        },
        "left_out": {"duplicates": 0, "too few words": 1},
    }
    assert store.meta["counts"]["tokens"] == 17


def test_equal_documents_stay_once_the_first_of_them(texts, toy_tokenizer, tmp_path):
    everything = decoded(build_store(texts, tmp_path / "all", toy_tokenizer))
    store = build_store(texts, tmp_path / "once", toy_tokenizer, dedup=True)
    assert len(everything) == 15
    assert decoded(store) == everything[:12] + [everything[13]]
    assert json.loads((store.path / "report.json").read_text())["left_out"] == {"duplicates": 2}


def test_near_duplicates_go_and_leave_their_signatures_behind(tokenizer, tmp_path):
    pytest.importorskip("rensa", reason="needs the package rensa")
    words = [f"word{i}" for i in range(200)]
    near, far = [*words[:100], "else", *words[101:]], words[::-1]
    for name, text in zip("abcd", (words, near, far, words), strict=True):
        (tmp_path / f"{name}.txt").write_text(" ".join(text))
    files = [tmp_path / f"{name}.txt" for name in "abcd"]
    store = build_store(files, tmp_path / "out", tokenizer, near_dedup=0.8)
    assert store.num_documents == 2
    assert json.loads((store.path / "report.json").read_text())["left_out"] == {"near duplicates": 2}
    assert not list(tmp_path.rglob("signatures.bin"))


def test_a_split_follows_from_the_text_of_each_document_alone(texts, toy_tokenizer, tmp_path):
    shares = {"valid": 0.3, "test": 0.2}
    train = build_store(texts, tmp_path / "a", toy_tokenizer, **shares)
    sides = {name: decoded(TokenStore(tmp_path / "a" / name)) for name in ("train", "valid", "test")}
    assert train.path == tmp_path / "a" / "train" and train.meta["side"] == "train"
    assert sum(map(len, sides.values())) == 15 and min(map(len, sides.values())) > 0
    backwards = [texts / f"{i}.txt" for i in (4, 2, 0, 1, 3)]
    build_store(backwards, tmp_path / "b", toy_tokenizer, **shares)
    for name, documents in sides.items():
        assert sorted(decoded(TokenStore(tmp_path / "b" / name))) == sorted(documents)
    for document in (text for file in texts.iterdir() for text in file.read_text().split("\n\n")):
        place = document_key(normal_form(document.splitlines())) / 2**64
        side = "valid" if place < 0.3 else "test" if place < 0.5 else "train"
        ids = toy_tokenizer.encode_plain([document.replace("\n", " ")])[0]
        assert toy_tokenizer.decode(ids) in sides[side]


def test_a_side_without_documents_is_refused_and_the_parts_stay(texts, toy_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no document of 15 fell to valid"):
        build_store(texts, tmp_path / "out", toy_tokenizer, valid=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [".out.parts"]


@pytest.mark.parametrize("recipe", [{}, {"dedup": True, "valid": 0.3, "test": 0.2, "on_bad_record": "skip"}])
def test_any_number_of_shards_and_workers_gives_the_same_bytes(texts, toy_tokenizer, tmp_path, recipe):
    build_store(texts, tmp_path / "whole", toy_tokenizer, **recipe)
    build_store(texts, tmp_path / "workers", toy_tokenizer, workers=3, **recipe)
    assert same_files(tmp_path / "whole", tmp_path / "workers")
    for n in (1, 2, 5):
        shards = [tmp_path / f"{i}-of-{n}" for i in range(n, 0, -1)]
        for i, shard in zip(range(n, 0, -1), shards, strict=True):
            assert build_store(texts, shard, toy_tokenizer, shard=(i, n), **recipe) is None
        merge_shards(shards, tmp_path / f"merged-{n}")
        assert same_files(tmp_path / "whole", tmp_path / f"merged-{n}")


def test_shards_that_do_not_belong_together_are_refused(texts, toy_tokenizer, tmp_path):
    for i in (1, 2, 3):
        build_store(texts, tmp_path / f"s{i}", toy_tokenizer, shard=(i, 3))
    build_store(texts, tmp_path / "cleaned", toy_tokenizer, shard=(3, 3), clean=True)
    build_store(texts, tmp_path / "half", toy_tokenizer, shard=(2, 2))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "shard.json").write_text('{"shard": [1, 3]}')
    for shards, message in (
        (("s1", "s3"), "shards are missing: 2/3"),
        (("s1", "s2", "s1"), "are both shard 1"),
        (("s1", "s2", "cleaned"), "cleaned differs from .*s1 in clean"),
        (("s1", "half"), "half differs from .*s1 in the number of shards"),
        (("s1", "nowhere"), "nowhere is no finished shard"),
        (("broken",), "shard.json is broken"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_shards([tmp_path / name for name in shards], tmp_path / "out")
    tokens = next((tmp_path / "s2").glob("*/tokens.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is missing or broken: prepare that shard again"):
        merge_shards([tmp_path / f"s{i}" for i in (1, 2, 3)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_is_used_again_and_another_is_never_overwritten(texts, toy_tokenizer, tmp_path):
    build_store(texts, tmp_path / "s", toy_tokenizer, shard=(1, 2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    build_store(texts, tmp_path / "s", toy_tokenizer, shard=(1, 2))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    for shard, recipe, message in (((2, 2), {}, "differs in shard"), ((1, 2), {"clean": True}, "differs in clean")):
        with pytest.raises(ValueError, match=message):
            build_store(texts, tmp_path / "s", toy_tokenizer, shard=shard, **recipe)
    for shard, recipe, message in (
        ((3, 2), {}, "in 1 to 2"),
        ((1, 6), {}, "only 5 files"),
        ((1, 2), {"max_documents": 3}, "does not go with a shard"),
    ):
        with pytest.raises(ValueError, match=message):
            build_store(texts, tmp_path / "t", toy_tokenizer, shard=shard, **recipe)


def test_documents_are_counted_over_all_files_and_workers(texts, toy_tokenizer, tmp_path):
    whole = build_store(texts, tmp_path / "whole", toy_tokenizer)
    for n, workers in ((1, 1), (3, 1), (7, 3), (99, 2)):
        store = build_store(texts, tmp_path / f"{n}", toy_tokenizer, max_documents=n, workers=workers)
        assert decoded(store) == decoded(whole)[:n]


def test_bad_records_are_counted_or_refused(toy_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": 3}\n{}\n{"text": "birds sing"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: column 'text' holds int"):
        build_store(tmp_path / "a.jsonl", tmp_path / "out", toy_tokenizer, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    store = build_store(tmp_path / "a.jsonl", tmp_path / "out", toy_tokenizer, on_bad_record="skip")
    assert decoded(store) == ["the cat", "birds sing"]
    assert json.loads((store.path / "report.json").read_text())["left_out"] == {"bad records": 2}


def test_finished_files_are_kept_when_another_is_broken_or_changed(texts, toy_tokenizer, tmp_path, monkeypatch):
    copies = [tmp_path / f"{i}.txt" for i in range(5)]
    for copy in copies:
        copy.write_bytes((texts / copy.name).read_bytes())
    copies[3].write_bytes(b"\xff")
    with pytest.raises(ValueError, match="3.txt:1"):
        build_store(copies, tmp_path / "out", toy_tokenizer)
    copies[3].write_bytes((texts / "3.txt").read_bytes())
    made, make = [], parts._make_part
    monkeypatch.setattr(parts, "_make_part", lambda file, *rest, **more: made.append(file) or make(file, *rest, **more))
    build_store(copies, tmp_path / "out", toy_tokenizer)
    assert made == copies[3:]
    build_store(texts, tmp_path / "whole", toy_tokenizer)
    assert same_files(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / ".out.parts").exists()


def test_a_folder_in_the_way_of_the_parts_is_left_alone(texts, toy_tokenizer, tmp_path):
    (tmp_path / ".out.parts").mkdir()
    (tmp_path / ".out.parts" / "thesis").write_text("mine")
    with pytest.raises(ValueError, match=".out.parts is in the way"):
        build_store(texts, tmp_path / "out", toy_tokenizer)
    assert (tmp_path / ".out.parts" / "thesis").read_text() == "mine"


def test_a_build_that_is_killed_goes_on_and_leaves_no_process(sample_corpus, tokenizer, tmp_path):
    lines = sample_corpus.read_text().splitlines(keepends=True)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}.jsonl").write_text("".join((lines + lines)[i : i + 12]))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = f"prepare --data {texts} --out {tmp_path / 'out'} --tokenizer {tmp_path / 'tokenizer'} --workers 2"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-m", "minibert", *command.split()], env=environment)
    deadline = time.monotonic() + 120

    def finished():
        return list(tmp_path.glob(".out.parts/[0-9a-f]*/part.json"))

    while len(finished()) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) == 2 and not (tmp_path / "out").exists()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    kept = finished()
    assert 4 <= len(kept) < 40
    made = []
    build_store(texts, tmp_path / "out", tokenizer, progress=made.append)
    assert made[-1]["files"] == made[-1]["of"] == 40
    assert not (tmp_path / ".out.parts").exists()
    build_store(texts, tmp_path / "whole", tokenizer)
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_a_recipe_out_of_range_is_refused(texts, toy_tokenizer, tmp_path):
    for recipe in (
        {"valid": 1.0},
        {"valid": 0.5, "test": 0.5},
        {"near_dedup": 1.5},
        {"min_words": -1},
        {"min_letters": 2.0},
        {"on_bad_record": "ignore"},
        {"max_documents": 0},
    ):
        name = next(iter(recipe))
        with pytest.raises(ValueError, match=name):
            build_store(texts, tmp_path / "out", toy_tokenizer, **recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_long_document_is_encoded_in_pieces(toy_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("The cat sat. " * 50 + "\n" + "Dogs bark! " * 40 + "\n\nWhy?")
    whole = build_store(tmp_path / "a.txt", tmp_path / "whole", toy_tokenizer)
    calls, encode = [], type(toy_tokenizer).encode_plain
    monkeypatch.setattr("minibert.data.parts.BATCH_CHARACTERS", 100)
    monkeypatch.setattr(
        type(toy_tokenizer), "encode_plain", lambda self, texts: calls.append(texts) or encode(self, texts)
    )
    pieces = build_store(tmp_path / "a.txt", tmp_path / "pieces", toy_tokenizer)
    assert max(sum(map(len, texts)) for texts in calls) <= 200 and len(calls) > 5
    assert np.array_equal(whole.tokens, pieces.tokens) and same_files(whole.path, pieces.path)


def test_chinese_text_works_like_english(tmp_path):
    characters = [chr(0x4E00 + i) for i in range(1500)]
    sentences = ["".join(characters[(7 * i + 11 * j) % 1500] for j in range(12)) + "。！？"[i % 3] for i in range(600)]
    (tmp_path / "zh.txt").write_text("\n\n".join("".join(sentences[i : i + 20]) for i in range(0, 600, 20)))
    lines = (line for document in read_documents(tmp_path / "zh.txt") for line in document)
    tokenizer = Tokenizer.train(lines, 4000)
    store = build_store(tmp_path / "zh.txt", tmp_path / "store", tokenizer)
    assert (store.num_documents, store.num_sentences, store.num_tokens) == (30, 600, 600 * 13)
    assert store.meta["counts"]["unknown"] <= 0.0005 * store.num_tokens  # an alphabet for English would miss a third
    batch, _ = PretrainingData(store, tokenizer, max_length=64).next_batch(0)
    assert batch.num_sequences > 40 and 0 < batch.nsp_labels.sum() < batch.num_sequences
