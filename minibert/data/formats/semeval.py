"""SemEval-2010 task 8: a numbered sentence with two marked entities, its relation below."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..records import SHOWN, Bad, Record
from ..text import number_lines

MARKERS = (["<e1>", "</e1>", "<e2>", "</e2>"], ["<e2>", "</e2>", "<e1>", "</e1>"])


def read_semeval(path: Path, bad: Bad) -> Iterator[Record]:
    for number, lines in _blocks(number_lines(path, bad), path, bad):
        try:
            record = _marked(f"{path}:{number}", *lines)
        except ValueError as error:
            bad(error)
        else:
            yield record


def _blocks(lines, path: Path, bad: Bad) -> Iterator[tuple[int, list[str]]]:
    """(line number, [sentence, relation…]) without comments; one with a line that is no text is left out."""
    block, start = None, 0
    for number, line in lines:
        if line is None:
            block = None
        elif re.match(r"\d+\t", line):
            if block:
                yield start, block
            block, start = [line], number
        elif line.strip() and not line.startswith("Comment"):
            if block is None:
                bad(ValueError(f"{path}:{number}: a relation without a sentence: {SHOWN.repr(line.strip())}"))
            else:
                block.append(line)
    if block:
        yield start, block


def _marked(where: str, sentence: str, *relations: str) -> Record:
    number, _, text = sentence.strip().partition("\t")
    if len(text) < 2 or not text[0] == text[-1] == '"':
        raise ValueError(f"{where}: text={SHOWN.repr(text)} is not in quotation marks")
    if re.findall("</?e[12]>", text) not in MARKERS:
        raise ValueError(f"{where}: text={SHOWN.repr(text)} needs one <e1>…</e1> and one <e2>…</e2>")
    if len(relations) > 1:
        raise ValueError(f"{where}: {len(relations)} relations, expected one below the sentence")
    label = {"label": relations[0].strip()} if relations else {}
    return Record(where, {"id": number, "text": text[1:-1]} | label)
