"""Files that are either whole or not there: atomic writes, fsync, and a manifest of sha256 sums."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

MANIFEST = "manifest.json"
BY_HAND = f"or changed on purpose (then delete {MANIFEST})"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside `path`, flush to the disk, rename: readers see the old file or the new one, never a part."""
    with open_atomically(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write to that takes the place of `path` when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file was written
        raise


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, only: Collection[str] = (), **extra) -> None:
    """Flush every file of `directory`, or `only` some, and list them with size and sha256 in `manifest.json`."""
    directory, files = Path(directory), {}
    for path in sorted(directory.iterdir()):
        wanted = path.name in only if only else path.name != MANIFEST and not path.name.startswith(".")
        if wanted and path.is_file():
            fsync_path(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_atomically(directory / MANIFEST, json.dumps({"files": files} | extra, indent=2) + "\n")
    fsync_path(directory)


def verify_manifest(directory: Path) -> dict:
    """Check every file that the manifest names; returns the manifest.

    Raises:
        ValueError: no manifest, a broken one, or a file that is missing, truncated or changed.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"].items())
    except FileNotFoundError:
        raise ValueError(f"{directory}: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: broken manifest ({error})") from None
    for name, entry in files.items():
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{path}: {name} is missing")
        try:
            size, digest = entry["bytes"], entry["sha256"]
        except (TypeError, KeyError):
            raise ValueError(f"{path}: {name} has no bytes or sha256") from None
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, {MANIFEST} says {size}: truncated, {BY_HAND}")
        if sha256(file) != digest:
            raise ValueError(f"{file}: its sha256 is not the one in {MANIFEST}: damaged, {BY_HAND}")
    return manifest
