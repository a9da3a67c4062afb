"""Tables: csv, tsv and parquet."""

from collections.abc import Iterator
from pathlib import Path

from ..records import SHOWN, Bad, Record
from ..text import need_pyarrow, suffix_of, table_rows


def read_table(path: Path, bad: Bad) -> Iterator[Record]:
    header = None
    for where, row in table_rows(path, suffix_of(path), bad):
        if header is None:
            header = _header(row, where)
        else:
            yield Record(where, dict(zip(header, row, strict=True)))


def _header(row: list[str], where: str) -> list[str]:
    twice = next((name for i, name in enumerate(row) if name and name in row[:i]), None)
    if twice is not None:
        raise ValueError(f"{where}: two columns are called {SHOWN.repr(twice)}")
    return row


def read_parquet(path: Path, bad: Bad) -> Iterator[Record]:
    pyarrow = need_pyarrow(path)
    try:
        row = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            _header(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=64):
                for fields in batch.to_pylist():
                    row += 1
                    yield Record(f"{path}: row {row}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {str(error).partition(chr(10))[0]}") from None
