"""Every format of labelled text that is read: a family a file, and the table that lists them."""

from ..text import json_object
from .documents import read_clinc, read_squad
from .lines import by_line, cola_fields, uci_fields
from .semeval import read_semeval
from .tables import read_parquet, read_table
from .tagged import read_conll, read_snips

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
