"""Combinations of parameters: pairs in the fast tests, the whole product among the slow ones."""

from itertools import product

import pytest


def pairwise(*axes, always=()) -> list:
    """The product of the axes as parameters, of which those are not slow that have every pair of two axes' values, and
    those of `always`. On a GPU none is slow.

    The last axis is the shortest one.
    """
    assert len(axes[-1]) == min(map(len, axes)), "the last axis is not the shortest: pairs would be missing"
    found = []
    for places in product(*(range(len(axis)) for axis in axes)):
        values = tuple(axis[place] for axis, place in zip(axes, places, strict=True))
        quick = places[-1] == sum(places[:-1]) % len(axes[-1]) or values in always
        found.append(pytest.param(*values, marks=() if quick else [pytest.mark.slow, pytest.mark.product]))
    return found
