"""Sequences of more than memory holds: on disk, and by the numbers of their items."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Items(Sequence[T]):
    """A sequence whose `item` takes a number from 0; a slice of it is a `Part`."""

    def item(self, number: int) -> T:
        raise NotImplementedError

    def __getitem__(self, index: int | slice) -> Any:
        number = range(len(self))[index]
        return Part(self, number) if isinstance(index, slice) else self.item(number)


class Spool(Items[T]):
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

    def item(self, number: int) -> T:
        start, end = self.ends[number : number + 2]
        return pickle.loads(os.pread(self.file.fileno(), end - start, start))


class Part(Items[T]):
    """The items with these numbers, in this order."""

    def __init__(self, items: Sequence[T], numbers: Iterable[int]):
        self.items, self.numbers = items, array("q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> T:
        return self.items[self.numbers[number]]


def take(items: Sequence[T], numbers: Iterable[int]) -> Sequence[T]:
    """The items with these numbers: a list of a list, else a `Part`."""
    return [items[number] for number in numbers] if isinstance(items, list) else Part(items, numbers)
