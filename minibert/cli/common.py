"""Steps that several verbs share."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Column, Table

from minibert_kernels.dispatch import use_triton

from .. import hub
from ..config import BertConfig, one_of
from ..data import TokenStore, build_store, read_documents
from ..data.objectives import check_objectives
from ..data.text import refuse
from ..data.tokenizer import Tokenizer
from ..files import write_atomically
from ..model import MODELS, BertForMaskedLM, BertForPreTraining
from ..train import Run, World, check_device, started
from ..train.log import jsonable


def say(text: str, **options) -> None:
    """A line on stderr; of several processes, the first says it for all."""
    if started().is_main:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False).print(text, **options)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one; a device that is not there is refused."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def check_backend(backend: str, device: str) -> None:
    """Refuse an implementation that cannot run here, before anything is read or written."""
    use_triton("the model", backend, torch.empty(0, device=device))


def one_directory(positional: list[str], flag: str | None) -> str:
    given = [*positional, *([flag] if flag else [])]
    if len(given) != 1:
        raise ValueError(f"name one directory, got {len(given)}")
    return given[0]


def refuse_filled(out) -> None:
    """An output directory must be new or empty."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not empty: choose another")


def refuse_taken(flag: str, file: str | None) -> None:
    """A file that is to be written must be new, in a directory that exists."""
    if file is not None and (Path(file).exists() or not Path(file).parent.is_dir()):
        raise ValueError(f"--{flag} {file}: expected a new file in a directory that exists")


def load(
    kind: type, source: Path, device: str, backend: str, allow_pickle: bool, dtype: str = "float32"
) -> torch.nn.Module:
    check_backend(backend, device)
    return kind.from_pretrained(source, backend=backend, allow_pickle=allow_pickle, dtype=dtype).to(device)


def model_kind(source: Path, allow_pickle: bool) -> type:
    """The model class with the most heads that a directory has weights for."""
    return MODELS[hub.architecture(source, allow_pickle)]


def language_model(config: BertConfig) -> type:
    """The model class that is pretrained, and read afterwards."""
    return BertForMaskedLM if config.causal else BertForPreTraining


def check_causal(config: BertConfig, objectives: list[str]) -> None:
    """Refuse a model whose attention is not what the objectives need."""
    if config.causal != any(kind.causal for kind in check_objectives(objectives)):
        raise ValueError(f"causal={config.causal} does not fit the objectives {', '.join(objectives)}")


def train_tokenizer(data: list[str], vocab_size: int, cased: bool, text_column: str, skip: bool = False) -> Tokenizer:
    """A tokenizer for this text; `skip` passes over what cannot be read."""
    bad = (lambda error: None) if skip else refuse
    lines = (line for document in read_documents(data, text_column=text_column, bad=bad) for line in document)
    return Tokenizer.train(lines, vocab_size, lowercase=not cased)


def find_store(path) -> Path | None:
    """Where the token store is that a path names, its training side if it is split; None where it is text."""
    found = (folder for folder in (Path(path), Path(path) / "train") if (folder / "meta.json").is_file())
    return next(found, None)


def open_store(data: list[str], out: Path, tokenizer: str | None, new: Mapping[str, Any]) -> TokenStore:
    """The store that `data` is, or its training side, or the one under `out` that is made of it.

    `new` holds vocab_size, cased and text_column, for a tokenizer that has to be trained; a store under `out` keeps the
    tokenizer it was made with.
    """
    if len(data) == 1 and (prepared := find_store(data[0])):
        store = TokenStore(prepared)
        if tokenizer is not None and Tokenizer.from_pretrained(tokenizer).hash != store.meta["tokenizer_hash"]:
            raise ValueError(
                f"{data[0]} was built with another tokenizer than {tokenizer}'s: prepare it again with that"
            )
        return store
    if tokenizer is not None:
        made = Tokenizer.from_pretrained(tokenizer)
    elif (out / "meta.json").is_file():
        made = TokenStore(out).tokenizer
    else:
        say("training a tokenizer")
        made = train_tokenizer(data, new["vocab_size"], new["cased"], new["text_column"])
    return build_store(data, out, made, text_column=new["text_column"])


def describe(store: TokenStore) -> str:
    return f"{store.num_documents:,} documents, {store.num_sentences:,} sentences, {store.num_tokens:,} tokens"


def save_options(run: Run, verb: str, options: dict[str, Any]) -> None:
    """Print the final options and keep them in the run as `config.yaml`, which `--config` reads; rank 0 does."""
    if not World.current().is_main:
        return
    kept = {name: value for name, value in options.items() if name != "resume"}
    text = yaml.safe_dump(kept, sort_keys=False)
    say(f"minibert {verb}\n{text}", end="")
    file = run.path / "config.yaml"
    if not (run.resume and file.exists()):  # a resume that is refused must not change what the run says of itself
        write_atomically(file, text)


def pick(options: Mapping[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


class BadRecords:
    """What becomes of records that cannot be used: `fail` ends the command, `skip` counts, `report` names each, too."""

    def __init__(self, mode: str):
        one_of("on_bad_record", mode, ("fail", "skip", "report"))
        self.mode, self.count = mode, 0

    def __call__(self, error: ValueError) -> None:
        if self.mode == "fail":
            raise error
        self.count += 1
        if self.mode == "report":
            say(str(error))

    def summary(self) -> None:
        if self.count:
            say(f"{self.count:,} records could not be used and were left out")


def print_json(value: Any) -> None:
    print(json.dumps(jsonable(value), ensure_ascii=False))


def print_result(result: Mapping[str, Any], as_json: bool, file=None) -> None:
    """One JSON object, or a table; a dictionary of dictionaries becomes a table of its own."""
    if as_json:
        print_json(result)
        return
    console = Console(highlight=False, markup=False, emoji=False, file=file or sys.stdout)
    table = Table(show_header=False)
    nested = {}
    for name, value in result.items():
        if isinstance(value, dict):
            nested[name] = value
        else:
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    for name, rows in nested.items():
        tabular = rows and all(isinstance(row, dict) for row in rows.values())
        columns = list(next(iter(rows.values()))) if tabular else []
        inner = Table(Column(name, no_wrap=True), *(columns or [""]))
        for row, values in rows.items():
            cells = [values[c] for c in columns] if columns else [values]
            inner.add_row(row, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
        console.print(inner)
