"""Files of a checkpoint that were cut off or changed: seen, named, and passed over for the checkpoint before."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from minibert import BertForPreTraining
from minibert.files import MANIFEST
from minibert.hub import WEIGHTS
from minibert.train import latest, verify
from minibert.train.loop import OPTIMIZER

from .common import Tally, flip, new_model, refusal, run


def truncations(tally: Tally, count: int, directory: Path) -> None:
    def cut(path: Path, rng: random.Random) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])

    damage(tally, count, directory, cut, (WEIGHTS, OPTIMIZER, "trainer.json", "config.json", "vocab.txt", MANIFEST))


def header_mutations(tally: Tally, count: int, directory: Path) -> None:
    damage(tally, count, directory, mutate_header, (WEIGHTS, OPTIMIZER))


def bit_flips(tally: Tally, count: int, directory: Path) -> None:
    def flip_payload(path: Path, rng: random.Random) -> None:
        flip(path, rng.randrange(8 + header_size(path), path.stat().st_size), rng.randrange(8))

    damage(tally, count, directory, flip_payload, (WEIGHTS, OPTIMIZER))


def header_size(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


def mutate_header(path: Path, rng: random.Random) -> None:
    """Bytes of the header at random, its length, or a change that leaves it well-formed."""
    content = bytearray(path.read_bytes())
    size = header_size(path)
    kind = rng.choice(["bytes", "length", "well-formed"])
    if kind == "bytes":
        for _ in range(rng.choice([1, 2, 9])):
            content[8 + rng.randrange(size)] ^= rng.randrange(1, 256)
    elif kind == "length":
        content[rng.randrange(8)] ^= 1 << rng.randrange(8)
    else:
        header = json.loads(content[8 : 8 + size])
        a, b = rng.sample(sorted(name for name in header if name != "__metadata__"), 2)
        change = rng.choice(["offsets", "dtype", "shape", "name", "missing"])
        if change == "offsets":
            header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]
        elif change == "dtype":
            header[a]["dtype"] = rng.choice(["I32", "F16", "BF16", "F64", "F99"])
        elif change == "shape":
            header[a]["shape"] = rng.choice([[2**40, 2**40], [0], [*header[a]["shape"], 2], [-1]])
        elif change == "name":
            header["x"] = header.pop(a)
        else:
            del header[a]
        text = json.dumps(header).encode()
        content[: 8 + size] = struct.pack("<Q", len(text)) + text
    path.write_bytes(content)


def damage(tally: Tally, count: int, directory: Path, spoil: Callable, names: tuple[str, ...]) -> None:
    """`verify`, loading and resuming see what `spoil` did to one file of the newest checkpoint."""
    run(directory, steps=4, save_every=2)
    newest, rng = directory / "step-4", random.Random(9)
    for n in range(count):
        path = newest / rng.choice(names)
        whole = path.read_bytes()
        while path.read_bytes() == whole:
            spoil(path, rng)
        with tally.trial(f"{path.name}, {n}"):
            refusal(lambda path=path: verify(newest), ValueError, names=path)
            if path.name != MANIFEST:  # of which the last line break may be missing, for all that loading cares
                refusal(lambda: BertForPreTraining.from_pretrained(newest), ValueError, names=newest)
            assert latest(directory).name == "step-2", "it was not passed over"
        path.write_bytes(whole)
    verify(newest)


def without_manifest(tally: Tally, count: int, directory: Path) -> None:
    """Weights that came without sums: cut off or with a broken header they are refused, never a crash.

    A header that still makes sense may load, and then gives a model of the shapes that config.json says.
    """
    model, rng = new_model(), random.Random(10)
    model.save_pretrained(directory)
    (directory / MANIFEST).unlink()
    whole, shapes = (directory / WEIGHTS).read_bytes(), [p.shape for p in model.parameters()]
    for n in range(count):
        cut = n % 2 == 0
        if cut:
            (directory / WEIGHTS).write_bytes(whole[: rng.randrange(len(whole))])
        else:
            mutate_header(directory / WEIGHTS, rng)
        with tally.trial(f"{'truncated' if cut else 'header'}, {n}"):
            try:
                loaded = BertForPreTraining.from_pretrained(directory)
            except ValueError as error:
                assert "\n" not in str(error) and str(directory) in str(error)
            else:
                assert not cut and [p.shape for p in loaded.parameters()] == shapes
        (directory / WEIGHTS).write_bytes(whole)
