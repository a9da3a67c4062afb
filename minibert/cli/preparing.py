"""Verbs that read unlabelled text: tokenizer, prepare."""

import inspect
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from ..data import Recipe, build_store, merge_shards
from ..data.clean import minhash
from ..data.report import draw_report, figure_class
from ..data.tokenizer import Tokenizer
from .common import pick, refuse_filled, say, train_tokenizer
from .flags import Cased, DataColumn, MaxDocuments, Out, Texts, Tokens, VocabSize

QUIET_SECONDS = 10  # between two lines of progress


def tokenizer(
    *,
    data: Texts,
    out: Out,
    vocab_size: VocabSize = 8192,
    cased: Cased = False,
    text_column: DataColumn = "text",
) -> None:
    """Train a WordPiece tokenizer.

    Example: minibert tokenizer --data corpus/ --out tokenizer --vocab-size 8192
    """
    refuse_filled(out)
    made = train_tokenizer(data, vocab_size, cased, text_column)
    made.save_pretrained(out)
    say(f"{made.vocab_size:,} pieces in {out}")


def prepare(
    *,
    data: Annotated[list[str], "files or folders of text, see docs/data.md"] = (),
    out: Out,
    tokenizer: Tokens = None,
    vocab_size: VocabSize = 8192,
    cased: Cased = False,
    text_column: DataColumn = "text",
    max_documents: MaxDocuments = None,
    on_bad_record: Annotated[str, "fail, or skip: leave out lines and rows that cannot be read"] = "fail",
    clean: Annotated[bool, "remove HTML tags, resolve entities, normalise Unicode and blanks"] = False,
    min_words: Annotated[int, "leave out documents of fewer words"] = 0,
    min_letters: Annotated[float, "leave out documents with a smaller share of letters"] = 0.0,
    dedup: Annotated[bool, "keep one of equal documents"] = False,
    near_dedup: Annotated[float | None, "leave out documents as similar as this to an earlier one, as 0.8"] = None,
    valid: Annotated[float, "share of the documents for a store of their own, OUT/valid"] = 0.0,
    test: Annotated[float, "share of the documents for OUT/test"] = 0.0,
    shard: Annotated[str | None, "i/n, as 2/8: only every n-th file, for --merge"] = None,
    merge: Annotated[list[str], "the folders of all shards, instead of --data"] = (),
    workers: Annotated[int | None, "processes, by default one a core"] = None,
    picture: Annotated[bool, "draw the lengths, OUT/lengths.png"] = False,
) -> None:
    """Turn text into a token store, which `pretrain --data` reads; what was killed goes on when started again.

    Example: minibert prepare --data corpus/ --out store --tokenizer tokenizer --dedup --valid 0.01
    """
    options = dict(locals())
    if picture:
        figure_class()  # refused before anything is read
    if merge:
        defaults = inspect.signature(prepare).parameters
        given = [name for name, value in options.items() if name != "out" and value != defaults[name].default]
        if extra := sorted({*given} - {"merge", "picture"}):
            raise ValueError(f"--merge takes everything from the shards: leave out {', '.join(extra)}")
        merge_shards(merge, out)
        return _finish(Path(out), picture)
    if not data:
        raise ValueError("name text with --data, or shards with --merge")
    recipe = pick(options, " ".join(field.name for field in fields(Recipe)))
    Recipe(**recipe)  # refused before a tokenizer is trained
    if near_dedup is not None:
        minhash()
    numbers = _parse_shard(shard)
    if numbers and picture:
        raise ValueError("a shard has no report: leave --picture to --merge")
    if numbers and tokenizer is None:
        raise ValueError("--shard needs --tokenizer: the shards must share one")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is not positive")
    made = (
        train_tokenizer(data, vocab_size, cased, text_column, skip=on_bad_record == "skip")
        if tokenizer is None
        else Tokenizer.from_pretrained(tokenizer)
    )
    workers = workers or len(os.sched_getaffinity(0))
    build_store(data, out, made, shard=numbers, workers=workers, progress=_progress(), **recipe)
    if numbers:
        return say(f"{out}: shard {shard}, for --merge")
    _finish(Path(out), picture)


def _parse_shard(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match:
        raise ValueError(f"shard={shard!r} is not i/n, as 2/8")
    return int(match[1]), int(match[2])


def _progress() -> Callable[[dict], None]:
    """Prints how far the files are, now and then."""
    last = time.monotonic()

    def show(counts: dict) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_SECONDS:
            last = time.monotonic()
            say(f"{counts['files']:,} of {counts['of']:,} files, {counts['tokens']:,} tokens")

    return show


def _finish(out: Path, picture: bool) -> None:
    """Say what the report says, and draw it."""
    report = out / "report.json"
    if not report.is_file():
        return say(f"{out} was there, without a report: it is of an earlier version")
    if picture:
        draw_report(out)
    content = json.loads(report.read_text(encoding="utf-8"))
    for name, count in content["left_out"].items():
        say(f"left out: {count:,} {name}")
    for name, part in content["stores"].items():
        counts = ", ".join(f"{part[unit]:,} {unit}" for unit in ("documents", "sentences", "tokens"))
        say(f"{out if name == 'all' else out / name}: {counts}, {part['unknown_rate']:.2%} unknown")
