"""Triton's interpreter without what takes most of its time and changes nothing that it computes.

It exchanges all functions of its language at each call of a function from a kernel, although the launch has done so;
it computes whether integers overflow, which it asserts in its debug mode alone; and it derives the type of each
intermediate value anew, with the name that is printed, of which a kernel has a few.
"""

import dataclasses
from contextlib import contextmanager
from operator import index

import pytest


@contextmanager
def quick():
    from triton.language import core
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call(interpreter))
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_get_np_dtype", _np_dtype(interpreter._get_np_dtype))
        patch.setattr(core.dtype, "__eq__", _equal(core.dtype.__eq__))
        patch.setattr(core.block_type, "__init__", _block_type(core.block_type.__init__))
        patch.setattr(core.tensor, "__init__", _tensor(core.tensor.__init__))
        yield


def _call(interpreter):
    done = set()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        languages = frozenset(name for name in ("tl", "core") if name in names)
        if languages - {"tl"} - done:  # Triton's own functions, which it never takes back
            interpreter._patch_lang(self.fn)
            done.update(languages)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    return call


def _np_dtype(plain):
    """Of a type; it depends on that of an element alone."""
    known = {}

    def np_dtype(type):
        name = type.scalar.name
        if name not in known:
            known[name] = plain(type)
        return known[name]

    return np_dtype


def _equal(plain):
    def equal(self, other):
        return self is other or plain(self, other)

    return equal


def _block_type(plain):
    """Types of the same elements and shape share what was derived for the first."""
    known = {}

    def init(self, element_ty, shape):
        key = element_ty.name, getattr(element_ty, "address_space", None), *map(index, shape)
        if key in known:
            vars(self).update(vars(known[key]))
        else:
            plain(self, element_ty, shape)
            known[key] = self

    return init


def _tensor(plain):
    """Values of one type object, or of block types that share, have the same shape and element type."""

    def init(self, handle, type):
        known = vars(type).get("of_a_tensor")
        if known is None:
            plain(self, handle, type)
            type.of_a_tensor = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(known, handle=handle)

    return init
