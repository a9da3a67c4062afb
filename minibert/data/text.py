"""Files and folders of text -> documents, one document in memory at a time."""

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MAX_DOCUMENT = 1 << 22  # characters; a file without blank lines is cut here, so that memory stays bounded
MAX_LINE = 1 << 26  # bytes; a longer line is no text
PACKED_SUFFIXES = {".gz", ".zst"}
TABLES = {  # separator and quoting; tsv files are published unquoted: a quotation mark there is a character of the text
    ".csv": (",", csv.QUOTE_MINIMAL),
    ".tsv": ("\t", csv.QUOTE_NONE),
}
UNCLOSED = "unexpected end of data"  # what csv says of a quotation mark that is never closed
ROW_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"}


def refuse(error: ValueError) -> None:
    """What is done with a broken record, unless the caller knows better."""
    raise error


def read_documents(
    paths, *, text_column: str = "text", bad: Callable[[ValueError], None] = refuse
) -> Iterator[list[str]]:
    """The documents of files and folders, each a list of paragraphs without surrounding blanks.

    Formats: `.txt` and unknown suffixes (documents between blank lines, a paragraph a line); WikiExtractor's `<doc …>`
    whatever the suffix; `.jsonl`/`.ndjson`/`.json` (an object a line), `.csv`, `.tsv` and `.parquet`, where a row is a
    document. All but parquet also as `.gz` and `.zst`.
    Args:
        paths: a path or several; folders are read recursively in sorted order, without hidden files.
        text_column: the column or field that holds the text of a row.
        bad: gets the error of each record that cannot be read, a line or row, and may let it pass.
    Raises:
        ValueError: a path is missing or holds no text, or a file is not UTF-8, is broken, or has no such column.
    """
    for path in as_paths(paths):
        found = False
        for file in list_files(path):
            for document in read_file(file, text_column, bad):
                found = True
                yield document
        if not found:
            raise no_text(path)


def read_file(file: Path, text_column: str, bad: Callable[[ValueError], None] = refuse) -> Iterator[list[str]]:
    """The documents of one file, see `read_documents`."""
    for document in _read_file(file, text_column, bad):
        paragraphs = [stripped for paragraph in document if (stripped := paragraph.strip())]
        if paragraphs:
            yield paragraphs


def no_text(path: Path) -> ValueError:
    return ValueError(f"{path} holds no text")


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


def _read_file(file: Path, text_column: str, bad) -> Iterator[list[str]]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1:] and suffixes[-1] in PACKED_SUFFIXES
    suffix = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if suffix not in ROW_SUFFIXES:
        first = next((line for line in read_lines(file, bad=lambda error: None) if line.strip()), "")
        return _wiki_documents(file, bad) if first.startswith("<doc ") else _plain_documents(file, bad)
    if suffix == ".parquet":
        if packed:
            raise ValueError(f"{file}: parquet is compressed inside: unpack the file")
        rows = _parquet_rows(file, text_column, bad)
    elif suffix in (".csv", ".tsv"):
        rows = _table_rows(file, text_column, suffix, bad)
    else:
        rows = _json_rows(file, text_column, bad)
    return (text.splitlines() for text in rows)


def read_lines(file: Path, bad: Callable[[ValueError], None] = refuse) -> Iterator[str]:
    """Lines with their line ends, decoded one by one, so that an error can say where it is."""
    return (line for _, line in number_lines(file, bad) if line is not None)


def number_lines(file: Path, bad: Callable[[ValueError], None] = refuse) -> Iterator[tuple[int, str | None]]:
    """(number, line) from 1; the line is None where it is not UTF-8 and `bad` let that pass."""
    try:
        with _open(file) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
                if len(line) == MAX_LINE:
                    raise ValueError(f"{file}:{number}: a line of more than {MAX_LINE >> 20} MB: is it text?")
                yield number, _decode(line, f"{file}:{number}", "utf-8-sig" if number == 1 else "utf-8", bad)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decode(line: bytes, where: str, encoding: str, bad) -> str | None:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        bad(ValueError(f"{where}: byte 0x{line[error.start]:02x} is not UTF-8: convert the file"))


def _open(file: Path):
    """A stream of bytes, unpacked where the suffix says so."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        return io.BufferedReader(need_pyarrow(file).input_stream(str(file), compression="zstd"), 1 << 20)
    return open(file, "rb")


def need_pyarrow(file: Path):
    """The package that reads parquet and zst, or the ValueError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: {file.suffix[1:]} needs more packages: pip install 'minibert[data]'") from None
    return pyarrow


def _plain_documents(file: Path, bad) -> Iterator[list[str]]:
    document, size = [], 0
    for line in read_lines(file, bad):
        if line.strip() and size < MAX_DOCUMENT:
            document.append(line)
            size += len(line)
        else:
            yield document
            document, size = [line], len(line)
    yield document


def _wiki_documents(file: Path, bad) -> Iterator[list[str]]:
    """WikiExtractor's format; the line that repeats the title is left out."""
    document, title, opened = None, None, 0
    for number, line in enumerate(read_lines(file, bad), 1):
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
            bad(ValueError(f"{file}:{number}: text outside of <doc …> and </doc>"))
    if document is not None:
        bad(ValueError(f"{file}:{opened}: this <doc …> is never closed: the file is cut off"))


def _json_rows(file: Path, column: str, bad) -> Iterator[str]:
    for number, line in number_lines(file, bad):
        if not (line and line.strip()):
            continue
        try:
            yield _json_text(line, f"{file}:{number}", column)
        except ValueError as error:
            bad(error)


def _json_text(line: str, where: str, column: str) -> str:
    try:
        row = json_object(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if column not in row:
        raise unknown_column(where, column, row)
    return _as_text(row[column], where, column)


def json_object(line: str) -> dict:
    """The object that a line holds."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON, expected one object a line: {json_reason(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def json_reason(error: Exception) -> str:
    """Why `json.loads` failed, in a few words; a number of too many digits is a ValueError of another kind."""
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _table_rows(file: Path, column: str, suffix: str, bad) -> Iterator[str]:
    rows = table_rows(file, suffix, bad)
    _, header = next(rows, ("", [column]))  # a file without rows lacks no column
    if column not in header:
        raise unknown_column(file, column, header)
    return (row[header.index(column)] for _, row in rows)


def suffix_of(path: Path) -> str:
    """The last suffix beside .gz and .zst."""
    name = path.name.lower()
    return Path(name.removesuffix(path.suffix.lower()) if path.suffix.lower() in PACKED_SUFFIXES else name).suffix


def table_rows(file: Path, suffix: str, bad) -> Iterator[tuple[str, list[str]]]:
    """("file:line", row) of the rows of a `.csv` or `.tsv` that are not empty, the first of which has the names.

    The line is that where a row begins, as a quoted field may hold several. A quotation mark that is never closed
    takes all that follows for one field: that is an error of the file as a whole, which `bad` does not get.
    """
    csv.field_size_limit(1 << 30)  # the default refuses a field beyond 128 KB
    separator, quoting = TABLES[suffix]
    width = 0

    def let(error: ValueError) -> None:
        (bad if width else refuse)(error)  # without its names no row is worth anything

    lines = (line or "" for _, line in number_lines(file, let))
    rows = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    while True:
        before, problem = rows.line_num, ""
        try:
            row = next(rows, None)
        except csv.Error as error:
            row, problem = [], str(error)
        if row is None:
            return
        width = width or len(row)
        if row and len(row) != width:
            problem = f"{len(row)} fields, the header has {width}"
        where, count = f"{file}:{before + 1}", rows.line_num - before
        if problem:
            swallowed = f", {count} lines were read as one row: is there a stray quotation mark?" if count > 1 else ""
            (refuse if problem == UNCLOSED else let)(ValueError(f"{where}: {problem}{swallowed}"))
        elif row:
            yield where, row


def _parquet_rows(file: Path, column: str, bad) -> Iterator[str]:
    pyarrow = need_pyarrow(file)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise unknown_column(file, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                try:
                    yield _as_text(text, f"{file}: row {number}", column)
                except ValueError as error:
                    bad(error)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def unknown_column(where, column: str, known: Iterable[str]) -> ValueError:
    """The error for a column that is not there: it names the known ones and offers the nearest."""
    known = [str(name) if str(name).isprintable() else repr(name) for name in known]
    near = difflib.get_close_matches(column, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{where}: no column {column!r} among {', '.join(known)}{hint}")


def _as_text(value, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    return value
