"""Text to a token store in two steps: every file becomes a part (see `parts`), and the parts are put together in order.

What one document cannot know of itself, whether it is a duplicate, is decided in the second step, which sees all
documents. So a store is the same, byte for byte, by how many processes or machines its parts were made.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..files import fsync_path
from .clean import SIGNATURE, find_similar, minhash
from .parts import (
    DOCUMENT,
    FILES,
    Progress,
    Recipe,
    make_parts,
    part_counts,
    part_name,
    read_part,
    settings_of,
    source_of,
)
from .report import Lengths, describe_part
from .store import VERSION, TokenStore
from .text import as_paths, list_files, no_text
from .tokenizer import Tokenizer

SHARD = "shard.json"


def build_store(
    paths,
    out,
    tokenizer: Tokenizer,
    *,
    shard: tuple[int, int] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    **recipe,
) -> TokenStore | None:
    """Read text, split it into sentences, encode them and write a store; memory does not grow with the corpus.

    The store appears under `out` only when it is complete. One that is already there is returned as it is, if it was
    built from the same files (by content), tokenizer and recipe. Until then its parts lie beside it, in a hidden
    folder; they are used when the build is started again.
    Args:
        paths: as in `read_documents`. recipe: the fields of `Recipe`.
        shard: (i, n), 1 <= i <= n: only make the parts of every n-th file, for `merge_shards`.
        workers: processes; a file is read by one of them.
        progress: called after each file with the counts so far.
    Returns:
        the store; that of the training documents where the recipe splits; None for a shard.
    Raises:
        ValueError: the text cannot be read or is empty, or `out` holds something else.
    """
    out, recipe = Path(out), Recipe(**recipe)
    if recipe.near_dedup is not None:
        minhash()
    owned = [(path, file) for path in as_paths(paths) for file in list_files(path)]
    names = [{"file": file.name, "bytes": file.stat().st_size} for _, file in owned]
    settings = settings_of(tokenizer, recipe)
    if shard:
        owned = _shard_of(owned, shard, recipe)
    sources = [source_of(file) for _, file in owned]
    wanted = {"shard": list(shard), "files": names} if shard else {}
    wanted |= settings | {"sources": sources}
    if _is_occupied(out):
        return _reuse(out, wanted, recipe)
    with _workshop(out, tokenizer) as workshop:
        parts = [workshop / part_name(settings, source) for source in sources]
        counts = make_parts([file for _, file in owned], parts, tokenizer, recipe, workers, progress)
        if shard:
            for other in {*workshop.iterdir()} - {*parts, workshop / "tokenizer"}:
                shutil.rmtree(other)  # of a build that was killed, or of files that have changed
            (workshop / SHARD).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            os.rename(workshop, out)
            return None
        for path in dict.fromkeys(path for path, _ in owned):
            mine = [count["read"] for (other, _), count in zip(owned, counts, strict=False) if other == path]
            if mine and not any(mine):
                raise no_text(path)
        return _assemble(parts[: len(counts)], workshop, out, tokenizer, wanted, recipe)


def merge_shards(shards: Sequence, out) -> TokenStore:
    """The store that `build_store` would have built from all files at once, byte for byte.

    Args:
        shards: the n folders that `build_store(shard=(i, n))` wrote, in any order.
    Raises:
        ValueError: one is missing, doubled or broken, or they were made of other files or by another recipe.
    """
    out, found = Path(out), {}
    for folder in map(Path, shards):
        statement = _read_shard(folder)
        number = statement["shard"][0]
        if number in found:
            raise ValueError(f"{folder} and {found[number][0]} are both shard {number}")
        found[number] = folder, statement
    folder, first = found[min(found)]
    for other, statement in found.values():
        different = [key for key in first if key not in ("shard", "sources") and statement.get(key) != first[key]]
        if different or statement["shard"][1] != first["shard"][1]:
            raise ValueError(f"{other} differs from {folder} in {', '.join(different) or 'the number of shards'}")
    total = first["shard"][1]
    missing = [f"{number}/{total}" for number in range(1, total + 1) if number not in found]
    if missing:
        raise ValueError(f"shards are missing: {', '.join(missing)}")
    settings = {key: value for key, value in first.items() if key not in ("shard", "files", "sources")}
    recipe = Recipe(**{name: settings[name] for name in asdict(Recipe())})
    where = [(*found[i % total + 1], i // total) for i in range(len(first["files"]))]
    sources = [statement["sources"][i] for _, statement, i in where]
    wanted = settings | {"sources": sources}
    if _is_occupied(out):
        return _reuse(out, wanted, recipe)
    parts = [folder / part_name(settings, source) for (folder, _, _), source in zip(where, sources, strict=True)]
    for part in parts:
        if part_counts(part) is None:
            raise ValueError(f"{part} is missing or broken: prepare that shard again")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    with _workshop(out, tokenizer) as workshop:
        return _assemble(parts, workshop, out, tokenizer, wanted, recipe)


def _shard_of(owned: list, shard: tuple[int, int], recipe: Recipe) -> list:
    number, total = shard
    if not 1 <= number <= total:
        raise ValueError(f"shard {number}/{total}: the first number is in 1 to {total}")
    if recipe.max_documents is not None:
        raise ValueError("max_documents counts all documents in order: it does not go with a shard")
    if len(owned) < total:
        raise ValueError(f"shard {number}/{total}: there are only {len(owned)} files")
    return owned[number - 1 :: total]


def _read_shard(folder: Path) -> dict:
    try:
        statement = json.loads((folder / SHARD).read_text(encoding="utf-8"))
        settings = {key: value for key, value in statement.items() if key not in ("shard", "files", "sources")}
        number, total = statement["shard"]
        if not 1 <= number <= total or len(statement["sources"]) != len(statement["files"][number - 1 :: total]):
            raise ValueError("its lists do not fit each other")
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']}, expected {VERSION}")
        Recipe(**{name: settings[name] for name in asdict(Recipe())})
    except OSError:
        raise ValueError(f"{folder} is no finished shard: it has no {SHARD}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SHARD} is broken ({error}): prepare that shard again") from None
    return statement


def _is_occupied(out: Path) -> bool:
    if out.is_dir():
        return any(out.iterdir())
    return out.exists()


def _reuse(out: Path, wanted: dict, recipe: Recipe) -> TokenStore | None:
    """The store or shard in `out` if it is what `wanted` describes."""
    store, found = None, {}
    if "shard" in wanted:
        if not (out / SHARD).is_file():
            raise ValueError(f"{out} already exists and is no shard: choose another folder")
        found = _read_shard(out)
    else:
        folder = out / recipe.stores[0]
        if not (folder / "meta.json").is_file():
            raise ValueError(f"{out} already exists and is no token store of this kind: choose another folder")
        store = TokenStore(folder)
        found = asdict(Recipe()) | store.meta  # a store may be older than some fields
    different = [key for key, value in wanted.items() if found.get(key) != value]
    if different:
        kind = "shard" if "shard" in wanted else "store"
        names = ", ".join(different)
        raise ValueError(f"{out} holds a {kind} that differs in {names}: choose another folder, or delete this one")
    return store


@contextmanager
def _workshop(out: Path, tokenizer: Tokenizer) -> Iterator[Path]:
    """The hidden folder beside `out` where parts are made; where a build fails it is kept, if it has parts."""
    folder = out.parent / f".{out.name}.parts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} is no directory to write into ({error.strerror}): choose another output") from None
    if any(folder.iterdir()) and not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder} is in the way: move it, or choose another output")
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
        yield folder
    except BaseException:
        if not any(file.stat().st_size for file in folder.glob("*/tokens.bin")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _assemble(parts, workshop: Path, out: Path, tokenizer, meta: dict, recipe: Recipe) -> TokenStore:
    """Put the documents of the parts that stay into their stores, write the report, and move all of it to `out`."""
    made = workshop / "store"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    left_out = Counter()
    for part in parts:
        left_out.update(part_counts(part)["left_out"])
    sides = _choose(parts, recipe, made, left_out)
    report = {"files": len(meta["sources"]), "stores": {}, "left_out": dict(sorted(left_out.items()))}
    with ExitStack() as stack:
        writers = []
        for name in recipe.stores:
            (made / name).mkdir(exist_ok=True)
            streams = [stack.enter_context(open(made / name / file, "wb")) for file in FILES[:3]]
            writers.append(_Writer(streams, tokenizer))
        start = 0
        for part in parts:
            for documents, lengths, ids in read_part(part, meta["dtype"]):
                side = sides[start : start + len(documents)]
                for number, writer in enumerate(writers):
                    writer.add(side == number, documents, lengths, ids)
                start += len(documents)
    for name, writer in zip(recipe.stores, writers, strict=True):
        if not writer.counts["documents"]:
            raise ValueError(
                f"no document of {len(sides)} fell to {name or 'the store'}: change the shares, or add text"
            )
        about = {"side": name} if name else {}
        text = json.dumps(meta | about | {"counts": writer.counts}, indent=2) + "\n"
        tokenizer.save_pretrained(made / name)
        (made / name / "meta.json").write_text(text, encoding="utf-8")
        report["stores"][name or "all"] = describe_part(writer.counts, writer.sentence_lengths, writer.document_lengths)
    (made / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for path in made.rglob("*"):
        fsync_path(path)
    fsync_path(made)
    os.rename(made, out)
    fsync_path(out.parent)
    return TokenStore(out / recipe.stores[0])


def _choose(parts: list[Path], recipe: Recipe, scratch: Path, left_out: Counter) -> np.ndarray:
    """int8 [documents]: the number of the store that each document goes to, -1 where it stays out."""
    keys = np.concatenate([np.fromfile(part / "documents.bin", DOCUMENT)["key"] for part in parts])
    if not len(keys):
        raise ValueError("the text holds no document with a token in it")
    side = np.zeros(len(keys), dtype=np.int8)
    if len(recipe.stores) > 1:
        place = (keys >> np.uint64(11)) * 2.0**-53
        borders = np.cumsum([getattr(recipe, name) for name in recipe.stores[1:]])
        side = ((np.searchsorted(borders, place, side="right") + 1) % (len(borders) + 1)).astype(np.int8)
    count = min(len(keys), recipe.max_documents or len(keys))
    side[count:] = -1
    if recipe.dedup:
        first = np.unique(keys[:count], return_index=True)[1]
        repeated = np.ones(count, dtype=bool)
        repeated[first] = False
        left_out["duplicates"] = int(repeated.sum())
        side[:count][repeated] = -1
    if recipe.near_dedup is not None:
        file = scratch / "signatures.bin"
        with open(file, "wb") as stream:
            for part in parts:
                with open(part / "signatures.bin", "rb") as source:
                    shutil.copyfileobj(source, stream)
        signatures = np.memmap(file, np.uint32, "r").reshape(-1, SIGNATURE)
        similar = find_similar(signatures[:count], recipe.near_dedup) & (side[:count] >= 0)
        left_out["near duplicates"] = int(similar.sum())
        side[:count][similar] = -1
        file.unlink()
    return side


class _Writer:
    """Appends documents to a store, and counts them."""

    def __init__(self, streams: list, tokenizer: Tokenizer):
        self._streams, self._unk_id = streams, tokenizer.unk_token_id
        for stream in streams[1:]:
            stream.write(np.zeros(1, np.int64))
        self.counts = dict.fromkeys(("documents", "sentences", "tokens", "unknown", "characters"), 0)
        self.sentence_lengths, self.document_lengths = Lengths(), Lengths()

    def add(self, mask: np.ndarray, documents: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Append the documents of `mask`; lengths and ids are those of all."""
        if not mask.all():
            in_sentence = np.repeat(mask, documents["sentences"])
            ids = ids[np.repeat(in_sentence, lengths)]
            documents, lengths = documents[mask], lengths[in_sentence]
        if not len(documents):
            return
        counts, (tokens, sentences, borders) = self.counts, self._streams
        ends, last = np.cumsum(lengths, dtype=np.int64), np.cumsum(documents["sentences"])
        tokens.write(ids)
        sentences.write(counts["tokens"] + ends)
        borders.write(counts["sentences"] + last)
        self.sentence_lengths.add(lengths)
        self.document_lengths.add(np.diff(ends[last - 1], prepend=0))
        counts["documents"] += len(documents)
        counts["sentences"] += len(lengths)
        counts["tokens"] += len(ids)
        counts["unknown"] += int((ids == self._unk_id).sum())
        counts["characters"] += int(documents["characters"].sum())
