"""Weights made to do harm: nothing of them is executed, and nothing outside their directory is read."""

import collections
import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch

from minibert import BertForPreTraining, hub
from minibert.hub import INDEX, PICKLE, WEIGHTS, hf_state, load_state

from .common import Tally, new_model, refusal


class Call:
    """Unpickled by anything but a careful reader, it calls."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def touch(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()"


def in_a_zip(name: str, payload: bytes) -> bytes:
    """A pickle where torch looks for one, in an archive of another name, with a record that would climb out."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/data.pkl", payload)
        archive.writestr(f"{name}/version", "3\n")
        archive.writestr("../../climbed", "out")
    return file.getvalue()


def in_a_tar(payload: bytes) -> bytes:
    """torch's format before the zip: it is unpacked to be read."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "../climbed"):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return file.getvalue()


def scripted(mark: Path) -> bytes:
    """A TorchScript archive, which is code."""
    content = in_a_zip("archive", pickle.dumps(Call(exec, touch(mark)), protocol=2))
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(Call(exec, touch(mark)), protocol=2))
        archive.writestr("archive/code/__torch__.py", touch(mark))
    return file.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda mark: saved(Call(os.system, f"touch {mark}")),
    "eval": lambda mark: saved({"x": Call(eval, touch(mark))}),
    "exec, before zip archives": lambda mark: saved(Call(exec, touch(mark)), _use_new_zipfile_serialization=False),
    "posix by name, protocol 0": lambda mark: f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode(),
    "a bare pickle": lambda mark: pickle.dumps({"x": Call(subprocess.check_call, ["touch", str(mark)])}, protocol=2),
    "deep inside a state": lambda mark: saved(
        collections.OrderedDict(x=torch.ones(3), y=[({"z": (Call(functools.partial, Call(exec, touch(mark))),)},)])
    ),
    "getattr of an import": lambda mark: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR" + f"(S'touch {mark}'\ntR.".encode()
    ),
    "an archive of another name": lambda mark: in_a_zip("other", pickle.dumps(Call(exec, touch(mark)), protocol=2)),
    "a tar archive": lambda mark: in_a_tar(pickle.dumps(Call(exec, touch(mark)), protocol=2)),
    "TorchScript": scripted,
    "a terabyte in four bytes": lambda mark: saved({"x": torch.ones(1).expand(2**38)}),
    "cut off": lambda mark: saved(hf_state(new_model()) | {"x": Call(exec, touch(mark))})[:-3000],
}


def pickles(tally: Tally, count: int, directory: Path) -> None:
    weights, mark = directory / "a" / "b", directory / "executed"
    new_model().save_pretrained(weights)
    (weights / WEIGHTS).unlink(), (weights / "manifest.json").unlink()
    path = weights / PICKLE
    pickle.loads(pickle.dumps(Call(exec, touch(mark)), protocol=2))
    assert mark.exists(), "the trap itself does not work"
    mark.unlink()
    for what, make in list(PICKLES.items())[:count]:
        path.write_bytes(make(mark))
        with tally.trial(what):
            refusal(lambda: BertForPreTraining.from_pretrained(weights), ValueError, names="allow_pickle=True")
            refusal(lambda: BertForPreTraining.from_pretrained(weights, allow_pickle=True), ValueError, names=path)
            assert not mark.exists(), "it was executed"
            there = {file.name for file in directory.rglob("*")}
            assert there == {"a", "b", "config.json", PICKLE}, f"something was written: {there}"


@contextlib.contextmanager
def every_file_read() -> Iterator[list[Path]]:
    """What safetensors is asked to open meanwhile."""
    load, opened = safetensors.torch.load_file, []
    with mock.patch.object(hub.safetensors.torch, "load_file", lambda path: (opened.append(Path(path)), load(path))[1]):
        yield opened


INDEX_PATHS = {
    "the folder above": "../outside.safetensors",
    "an absolute path": "{outside}",
    "a link": "link.safetensors",
    "NUL": "shard.safetensors\0.txt",
    "another drive": "C:\\outside.safetensors",
    "a folder inside": "inner/shard.safetensors",
    "a device": "null.safetensors",
    "a file that is not there": "missing.safetensors",
    "a directory": "inner",
    "unicode dots": "‥/outside.safetensors",
    "a pipe, which would wait for ever": "pipe.safetensors",
    "a line break": "a\nb.safetensors",
}


def index_paths(tally: Tally, count: int, directory: Path) -> None:
    model = new_model()
    outside, weights = directory / "outside.safetensors", directory / "weights"
    model.save_pretrained(weights)
    (weights / "manifest.json").unlink()
    whole = {name: value.clone() for name, value in hf_state(model).items()}
    first = sorted(whole)[:9]
    safetensors.torch.save_file({name: whole[name] for name in first}, weights / "shard.safetensors")
    safetensors.torch.save_file({name: whole[name] for name in whole if name not in first}, outside)
    (weights / WEIGHTS).unlink()
    (weights / "inner").mkdir()
    shutil.copy(outside, weights / "inner" / "shard.safetensors")
    (weights / "link.safetensors").symlink_to(outside)
    os.mkfifo(weights / "pipe.safetensors")
    device = weights / "null.safetensors"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))
    except PermissionError:  # only root makes a device
        device.symlink_to("/dev/zero")
    for what, name in list(INDEX_PATHS.items())[:count]:
        name = name.format(outside=outside)
        where = {tensor: "shard.safetensors" if tensor in first else name for tensor in whole}
        (weights / INDEX).write_text(json.dumps({"weight_map": where}))
        with tally.trial(what), every_file_read() as opened:
            refusal(lambda: load_state(weights), ValueError, names=weights / INDEX)
            assert {path.name for path in opened} <= {"shard.safetensors"}, f"read: {opened}"
            assert all(path.parent == weights and not path.is_symlink() for path in opened), f"read: {opened}"
