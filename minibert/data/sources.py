"""Published files and folders of labelled text: which files are which split."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .formats import FORMATS, LINES, READERS, format_of, is_snips
from .formats.documents import CLINC_PARTS, read_document
from .formats.lines import by_line
from .records import Bad, Record
from .text import as_paths, refuse, suffix_of

SHARD = re.compile(r"-\d+-of-\d+$")
# the names that files of a split have; the last two are those of SemEval-2010 task 8
STEMS = {
    "train": ("train", "train_file"),
    "valid": ("valid", "dev", "validation", "val"),
    "test": ("test", "test_file_full"),
}


@dataclass(frozen=True)
class Source:
    """The files of one split, read anew each time; `part` has the keys of that split where a file holds several."""

    paths: tuple[Path, ...]
    part: tuple[str, ...] | None = None

    def records(
        self, bad: Bad = refuse, fields_of: Callable[[str], dict] | None = None, plain: bool = False
    ) -> Iterator[Record]:
        """The records of every file; `bad` gets the error of each broken one and may let it pass.

        `fields_of` makes a record's fields of a line of plain text; such files are refused where it is None. `plain`
        takes every .txt for one, whatever its lines look like.

        Raises:
            ValueError: a file is missing, of no known form, without records, or broken as a whole.
        """
        for path in self.paths:
            kind, found = LINES if plain and suffix_of(path) == ".txt" else format_of(path), False
            if kind == LINES and fields_of is None:
                raise ValueError(
                    f"{path}: no labelled text: expected sentence TAB 0/1, token and tag columns, or SemEval's "
                    "<e1>, <e2>"
                )
            read = by_line(fields_of) if kind == LINES else READERS[kind]
            for record in read(path, bad) if self.part is None else read(path, bad, self.part):
                found = True
                yield record
            if not found:
                raise ValueError(f"{path}: it holds no records")


def find_splits(path) -> dict[str, Source]:
    """The sources of "train", "valid" and "test" that a path holds.

    Args:
        path: a folder with files, or SNIPS folders, called train, valid (dev, validation, val) and test, at most one
            level down; a file of CLINC150, which holds all three; any other file, or a list of files, is "train".
    Raises:
        ValueError: the path is missing, or a folder has no train file or two of one split; the message lists them.
    """
    path, *others = as_paths(path)
    if others:
        return {"train": Source((path, *others))}
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir() or is_snips(path):
        return _clinc_splits(path) if format_of(path) == "clinc150" else {"train": Source((path,))}
    shown = [place for place in sorted(path.iterdir()) if not place.name.startswith(".")]
    places = [shown, [file for place in shown if place.is_dir() for file in sorted(place.iterdir())]]
    for level in places:
        found = {split: _only(path, split, level) for split in STEMS}
        if found["train"]:
            return {split: Source(files) for split, files in found.items() if files}
    labelled = ", ".join(str(file.relative_to(path)) for level in places for file in level if _is_labelled(file))
    raise ValueError(f"{path}: it has no train file" + (f"; name one with --train: {labelled}" if labelled else ""))


def _only(folder: Path, split: str, places: Sequence[Path]) -> tuple[Path, ...]:
    """The one file, or the shards of it, that a split is called after."""
    files = [place for place in places if _base(place) in STEMS[split] and _may_be_labelled(place)]
    if len({(file.parent, _base(file), suffix_of(file)) for file in files}) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ValueError(f"{folder}: several files are called {split}, name one with --{split}: {names}")
    return tuple(files)


def _may_be_labelled(place: Path) -> bool:
    return is_snips(place) if place.is_dir() else suffix_of(place) in FORMATS


def _is_labelled(place: Path) -> bool:
    try:
        return format_of(place) != LINES
    except ValueError:
        return False


def _clinc_splits(path: Path) -> dict[str, Source]:
    keys = read_document(path)
    parts = {split: tuple(key for key in names if key in keys) for split, names in CLINC_PARTS.items()}
    return {split: Source((path,), part) for split, part in parts.items() if part}


def _base(path: Path) -> str:
    """The name without suffixes, and without the number that one file of several has."""
    return SHARD.sub("", path.name.lower().partition(suffix_of(path) or "\0")[0])
