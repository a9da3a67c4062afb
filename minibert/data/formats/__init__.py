"""Every format of labelled text that is read: a family a file, the tables that list them, and how one is recognised."""

import re
from itertools import islice
from pathlib import Path

from ...config import one_of
from ..text import json_object, read_lines, suffix_of
from .documents import CLINC_PARTS, read_clinc, read_squad
from .lines import by_line, cola_fields, split_columns, uci_fields
from .semeval import read_semeval
from .tables import read_parquet, read_table
from .tagged import SNIPS_FILES, read_conll, read_snips, split_words

LINES = "lines"  # the form of plain text, of which no label is known
TAG = re.compile(r"O|[BIES]-\S+")
# every container: a file or folder, and what gets the error of each broken record -> records
READERS = {
    "csv": read_table,
    "tsv": read_table,
    "jsonl": by_line(json_object),
    "parquet": read_parquet,
    "cola": by_line(cola_fields),
    "uci": by_line(uci_fields),
    "snips": read_snips,
    "conll": read_conll,
    "semeval": read_semeval,
    "squad": read_squad,
    "clinc150": read_clinc,
}


def format_of(path: Path) -> str:
    """The container that a file or folder is, a key of `READERS` or `LINES`: by its suffix and, where needed, its first
    lines.

    Raises:
        ValueError: it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        if not is_snips(path):
            raise ValueError(f"{path}: a folder without {SNIPS_FILES[0]}, expected a file")
        return "snips"
    suffix = suffix_of(path)
    one_of(f"{path}: file type", suffix, FORMATS)
    if suffix == ".parquet" and path.suffix.lower() != suffix:
        raise ValueError(f"{path}: parquet is compressed inside: unpack the file")
    known = FORMATS[suffix]
    return known if isinstance(known, str) else known(path)


def is_snips(place: Path) -> bool:
    return (place / "seq.in").is_file()


def _start(path: Path) -> list[str]:
    """The first few lines that are not blank."""
    return list(islice((line for line in read_lines(path, bad=lambda error: None) if line.strip()), 9))


def _tsv_format(path: Path) -> str:
    start = [split_columns(line) for line in _start(path)[:1]]
    return "cola" if start and len(start[0]) == 4 and start[0][1] in ("0", "1") and start[0][2] in ("", "*") else "tsv"


# the first key of an object, behind others that hold a string or a number, and the bracket that it opens
FIRST_LIST = re.compile(r'\s*\{\s*(?:"\w+"\s*:\s*(?:"[^"]*"|[\d.]+)\s*,\s*)*"(\w+)"\s*:\s*\[')


def _json_format(path: Path) -> str:
    match = FIRST_LIST.match("".join(_start(path)))
    key = match[1] if match else None
    return "squad" if key == "data" else "clinc150" if key in sum(CLINC_PARTS.values(), ()) else "jsonl"


def _txt_format(path: Path) -> str:
    start = _start(path)
    if not start:
        raise ValueError(f"{path}: it holds no records")
    if re.match(r'\d+\t"', start[0]):
        return "semeval"
    if re.search(r"\t[01]\s*$", start[0]):
        return "uci"
    rows = [split_words(line) for line in start if not line.startswith("-DOCSTART-")][:2]
    # two of one width: a single line may be a text that ends as a tag does
    columns = [len(row) for row in rows if len(row) > 1 and TAG.fullmatch(row[-1])]
    return "conll" if len(columns) == 2 and columns[0] == columns[1] else LINES


# what a suffix stands for, or the function that looks into the file
FORMATS = {
    ".csv": "csv",
    ".tsv": _tsv_format,
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": _json_format,
    ".parquet": "parquet",
    ".txt": _txt_format,
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
    ".train": "conll",  # as in eng.train, eng.testa and eng.testb of CoNLL-2003
    ".testa": "conll",
    ".testb": "conll",
}
