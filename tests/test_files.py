"""A file is whole or not there, and a manifest sees every change."""

import json
import os
import random

import pytest

from minibert.files import MANIFEST, sha256, verify_manifest, write_atomically, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "b.txt").write_text("words\n")
    (tmp_path / "inner").mkdir()
    write_manifest(tmp_path, step=7)
    return tmp_path


@pytest.mark.parametrize("content", ["wörter\n", b"\x00\xff", ""])
def test_what_is_written_is_there_and_nothing_else(tmp_path, content):
    write_atomically(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, step):
    (tmp_path / "x").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'x'}'"):
        write_atomically(tmp_path / "x", "new")


def test_the_new_name_appears_only_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "x", "new")
    assert calls == ["fsync", "replace"]


def test_a_manifest_names_files_sizes_and_sums(directory):
    manifest = verify_manifest(directory)
    assert manifest == json.loads((directory / MANIFEST).read_text()) and manifest["step"] == 7
    assert set(manifest["files"]) == {"a.bin", "b.txt"}
    assert manifest["files"]["a.bin"] == {"bytes": 768, "sha256": sha256(directory / "a.bin")}
    assert sha256(directory / "b.txt") == "ff646650bc064e5981d37e75caf62e8551f146dff3b8967dd9cf36d263480e3a"


def test_a_manifest_may_vouch_for_some_files_only(directory):
    write_manifest(str(directory), only=("b.txt", "not-there"))
    assert set(verify_manifest(directory)["files"]) == {"b.txt"}
    (directory / "a.bin").write_bytes(b"")
    assert verify_manifest(directory)


def test_a_new_file_beside_the_listed_ones_is_no_damage(directory):
    (directory / "notes.md").write_text("mine")
    assert set(verify_manifest(directory)["files"]) == {"a.bin", "b.txt"}


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_bit_is_seen(directory, seed):
    draw = random.Random(seed)
    file = directory / draw.choice(["a.bin", "b.txt"])
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        verify_manifest(directory)
    hint = "damaged, or changed on purpose (then delete manifest.json)"
    assert str(error.value) == f"{file}: its sha256 is not the one in manifest.json: {hint}"


def test_truncated_grown_and_missing_files_are_seen(directory):
    (directory / "a.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"a\.bin: 100 bytes, manifest\.json says 768: truncated, or changed"):
        verify_manifest(directory)
    (directory / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: a\.bin is missing"):
        verify_manifest(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "broken manifest"),
        ("{", "broken manifest"),
        ("[]", "broken manifest"),
        ('{"files": ["a.bin"]}', "broken manifest"),
        ('{"file": {}}', "broken manifest"),
        (b"\xff\xfe", "broken manifest"),
        ("[" * 100_000, "broken manifest"),
        ('{"files": {"a.bin": 3}}', "a.bin has no bytes or sha256"),
        ('{"files": {"a.bin": {"bytes": 768}}}', "a.bin has no bytes or sha256"),
        ('{"files": {"../a.bin": {"bytes": 768, "sha256": ""}}}', "../a.bin is missing"),
        ('{"files": {"inner": {"bytes": 768, "sha256": ""}}}', "inner is missing"),
    ],
)
def test_a_broken_manifest_is_one_clear_line(directory, content, message):
    (directory / MANIFEST).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as error:
        verify_manifest(directory)
    assert message in str(error.value) and str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_manifest_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"it has no manifest\.json"):
        verify_manifest(tmp_path)
