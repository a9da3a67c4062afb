"""What `xray` keeps between runs: JSON files in $MINIBERT_XRAY_CACHE, by default minibert/xray of the user's cache."""

import hashlib
import json
import os
from pathlib import Path


def folder() -> Path:
    own, shared = os.environ.get("MINIBERT_XRAY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "minibert" / "xray"


def digest(parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def read(path: Path, names):
    """What was kept, if it has just these names; what was damaged is as good as missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        every = found if isinstance(found, list) else [found]
        return found if every and all(set(one) == set(names) for one in every) else None
    except (OSError, ValueError, TypeError):
        return None


def write(path: Path, value) -> None:
    """Keep a value, whole or not at all; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(value), encoding="utf-8")
        own.replace(path)
    except OSError:
        pass
