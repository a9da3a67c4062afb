"""Sequences of more than memory holds: on disk, and by the numbers of their items."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class Spool(Sequence[T]):
    """The items, in a temporary file without a name, which is gone with this object; 8 bytes of memory for each.

    Raises OSError where the disk of temporary files (TMPDIR) is full.
    """

    def __init__(self, items: Iterable[T]):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  (it is closed with this object)
        self.ends = array("Q", [0])
        for item in items:
            self.ends.append(self.ends[-1] + self.file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))
        self.file.flush()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> T:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self.ends[index % len(self)], self.ends[index % len(self) + 1]
        return pickle.loads(os.pread(self.file.fileno(), end - start, start))


class Part(Sequence[T]):
    """The items with these numbers, in this order."""

    def __init__(self, items: Sequence[T], numbers: Iterable[int]):
        self.items, self.numbers = items, array("q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> T:
        return self.items[self.numbers[index]]


def take(items: Sequence[T], numbers: Iterable[int]) -> Sequence[T]:
    """The items with these numbers: a list of a list, else a `Part`."""
    return [items[number] for number in numbers] if isinstance(items, list) else Part(items, numbers)


class Joined(Sequence[T]):
    """The items of several sequences, one after the other."""

    def __init__(self, parts: Iterable[Sequence[T]]):
        self.parts = list(parts)
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> T:
        for part, end in zip(self.parts, self.ends, strict=True):
            if index < end:
                return part[index - end + len(part)]
        raise IndexError(index)
