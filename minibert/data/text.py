"""Files and folders of text -> documents -> sentences, one document in memory at a time."""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_DOCUMENT = 1 << 24  # characters; a file without blank lines is cut here, so that memory stays bounded
ROW_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"}


def read_documents(paths, *, text_column: str = "text") -> Iterator[list[str]]:
    """The documents of files and folders, each a list of paragraphs without surrounding blanks.

    Formats: `.txt` and unknown suffixes (documents between blank lines, a paragraph a line); WikiExtractor's `<doc …>`
    whatever the suffix; `.jsonl`/`.ndjson`/`.json` (an object a line), `.csv`, `.tsv` and `.parquet`, where a row is a
    document.
    Args:
        paths: a path or several; folders are read recursively in sorted order, without hidden files.
        text_column: the column or field that holds the text of a row.
    Raises:
        ValueError: a path is missing or holds no text, or a file is not UTF-8, is broken, or has no such column.
    """
    for path in as_paths(paths):
        found = False
        for file in list_files(path):
            for document in _read_file(file, text_column):
                paragraphs = [stripped for paragraph in document if (stripped := paragraph.strip())]
                if paragraphs:
                    found = True
                    yield paragraphs
        if not found:
            raise ValueError(f"{path} holds no text")


def as_paths(paths) -> list[Path]:
    """One path or several, as a list; nothing at all is a ValueError."""
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not paths:
        raise ValueError("no file or folder of text was named")
    return paths


def list_files(path: Path) -> list[Path]:
    """The file itself, or the files below a folder, sorted and without hidden ones."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    files = (file for file in path.rglob("*") if file.is_file())
    shown = sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not shown:
        raise ValueError(f"{path} is a folder without files")
    return shown


def _read_file(file: Path, text_column: str) -> Iterator[list[str]]:
    suffix = file.suffix.lower()
    if suffix not in ROW_SUFFIXES:
        return _wiki_documents(file) if _first_line(file).startswith("<doc ") else _plain_documents(file)
    if suffix == ".parquet":
        rows = _parquet_rows(file, text_column)
    elif suffix in (".csv", ".tsv"):
        rows = _table_rows(file, text_column, suffix)
    else:
        rows = _json_rows(file, text_column)
    return (text.splitlines() for text in rows)


def read_lines(file: Path) -> Iterator[str]:
    """Lines with their line ends, decoded one by one, so that an error can say where it is."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise ValueError(f"{file}:{number}: byte 0x{byte:02x} is not UTF-8: convert the file") from None
                yield text
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _first_line(file: Path) -> str:
    return next((line for line in read_lines(file) if line.strip()), "")


def _plain_documents(file: Path) -> Iterator[list[str]]:
    document, size = [], 0
    for line in read_lines(file):
        if line.strip() and size < MAX_DOCUMENT:
            document.append(line)
            size += len(line)
        else:
            yield document
            document, size = [line], len(line)
    yield document


def _wiki_documents(file: Path) -> Iterator[list[str]]:
    """WikiExtractor's format; the line that repeats the title is left out."""
    document, title, opened = None, None, 0
    for number, line in enumerate(read_lines(file), 1):
        if line.startswith("<doc ") and document is None:
            match = re.search(r'title="(.*)"', line)
            document, title, opened = [], match and match[1], number
        elif line.startswith("</doc>") and document is not None:
            yield document[1:] if document and document[0].strip() == title else document
            document = None
        elif document is not None:
            if line.strip():
                document.append(line)
        elif line.strip():
            raise ValueError(f"{file}:{number}: text outside of <doc …> and </doc>")
    if document is not None:
        raise ValueError(f"{file}:{opened}: this <doc …> is never closed: the file is cut off")


def _json_rows(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise ValueError(f"{file}:{number}: broken JSON, expected one object a line: {reason}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
        if column not in row:
            raise unknown_column(f"{file}:{number}", column, row)
        yield _as_text(row[column], f"{file}:{number}", column)


def _table_rows(file: Path, column: str, suffix: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)  # the default refuses a field beyond 128 KB
    quoting = csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE  # tsv files are published unquoted
    rows = csv.reader(read_lines(file), delimiter="," if suffix == ".csv" else "\t", quoting=quoting, strict=True)
    try:
        header = next(rows, [])
        if header and column not in header:
            raise unknown_column(file, column, header)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{file}:{rows.line_num}: {len(row)} columns, the header has {len(header)}")
            yield row[header.index(column)]
    except csv.Error as error:
        raise ValueError(f"{file}:{rows.line_num}: {error}") from None


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: parquet needs more packages: pip install 'minibert[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise unknown_column(file, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _as_text(text, f"{file}: row {number}", column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def unknown_column(where, column: str, known: Iterable[str]) -> ValueError:
    """The error for a column that is not there: it names the known ones and offers the nearest."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(column, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{where}: no column {column!r} among {', '.join(known)}{hint}")


def _as_text(value, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    return value


# a full stop, then blanks and something that may open a sentence; or a Chinese or Japanese full stop. Possessive, and
# only at the first of several stops: a line of a million dots takes linear time
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+\s++(?=["'“‘«(\[]*+[^\sa-zß-öø-ÿα-ωа-яё.,;:!?)\]])"""
    r"""|(?<![。！？])[。！？]++["”’」』）]*+\s*+(?=\S)"""
)
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TITLES = _words(
    """mr mrs ms dr prof rev hon st sen rep gov gen col maj capt lt sgt cmdr adm pres messrs mt ft vs cf viz
    approx ca esp al e.g i.e"""
)
_BEFORE_NUMBERS = _words("no nos p pp fig figs vol ch sec art eq ed jan feb mar apr jun jul aug sep sept oct nov dec c")
_ENDINGS = _words("jr sr inc ltd co corp bros etc ave blvd")
_STARTERS = _words(
    """the a an this that these those he she it they we you i in on at by for from as after before when while
    if since although however but and its his her their our there here no not some many most all both one two such
    with"""
)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, without surrounding blanks.

    Splits after . ! ? … and their quotes and brackets where a capital, digit or opening mark follows, but not after
    titles, initials, abbreviations and list numbers; and after 。！？. Decimals and inner dots (3.14, minibert.data)
    never split.
    """
    sentences, start = [], 0
    for match in _END.finditer(paragraph):
        if paragraph[match.start()] == "." and not _ends_sentence(paragraph, start, match):
            continue
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _ends_sentence(text: str, start: int, match: re.Match) -> bool:
    """Whether the full stop of `match` ends the sentence that begins at `start`, judged by its two neighbours."""
    if text[match.start() : match.end()].rstrip() != ".":
        return True  # an ellipsis, or a quote or bracket after the full stop
    before = text[max(start, match.start() - 24) : match.start()].rsplit(None, 1)
    word = before[-1].lstrip("\"'“‘«([") if before else ""
    lower = word.lower()
    if lower in _TITLES:
        return False
    after = text[match.end() : match.end() + 16].lstrip("\"'“‘«([").split(None, 1)
    following = after[0].rstrip(",.;:").lower() if after else ""
    if lower in _BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if lower in _ENDINGS or _DOTTED.fullmatch(word):
        return following in _STARTERS
    if len(word) == 1 and word.isupper() and word != "I":
        return following in _STARTERS
    return not (word.isdigit() and len(word) < 3 and text[start : match.start()].strip() == word)
