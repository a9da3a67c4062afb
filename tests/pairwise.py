"""Combinations of parameters: pairs in the fast tests, the whole product among the slow ones."""

from itertools import product

import pytest


def pairwise(*axes) -> list:
    """The product of the axes as parameters, of which those are not slow that have every pair of two axes' values.

    The last axis is the shortest one.
    """
    found = []
    for places in product(*(range(len(axis)) for axis in axes)):
        quick = places[-1] == sum(places[:-1]) % len(axes[-1])
        values = (axis[place] for axis, place in zip(axes, places, strict=True))
        found.append(pytest.param(*values, marks=() if quick else pytest.mark.slow))
    return found
