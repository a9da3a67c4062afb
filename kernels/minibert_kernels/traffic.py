"""The bytes that each op's kernels move, counted in the interpreter, against the least they could.

    python -m minibert_kernels.traffic [--only PATTERN] [--json]

Memory moves in sectors of 32 bytes. A sector counts as often as one program touches it; where several programs touch
the same, it counts once, because the cache between them serves the others. So a weight vector that every program reads
counts once, a row that its program reads twice counts twice, and a second kernel pays again. What torch does inside an
op (sorting ids, adding partial sums) is not seen.

The minimum reads each input and writes each output once. `saved` is what the op keeps for its backward beside its
parameters, in bytes a token.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from . import (
    attention,
    bias_geglu,
    bias_gelu,
    bias_swiglu,
    dropout_add_norm,
    embed_norm,
    lamb_step,
    linear_cross_entropy,
    mlm_mask,
    pack,
    select_rows,
    unpack,
)
from ._triton import AVAILABLE
from .dispatch import interpreting
from .lamb import least_bytes

SECTOR = 32
TOKENS, WIDTH = 256, 768  # what the row ops are counted at, in float16, whose bytes are those of bfloat16


class Traffic:
    """Sectors touched since it was made; `bytes` adds up the launches."""

    def __init__(self):
        self.launches, self._programs, self._program = [], [], None

    @property
    def bytes(self) -> int:
        return sum(self.launches)

    def begin_launch(self, launch) -> None:
        pass

    def touch(self, program, pointers, mask, size, writes) -> None:
        if program != self._program:
            self._close_program()
            self._program = program
        self._current.append(np.unique(pointers[mask] // SECTOR))

    def _close_program(self) -> None:
        if self._program is not None:
            self._programs.append(np.unique(np.concatenate(self._current), return_counts=True))
        self._program, self._current = None, []

    def end_launch(self) -> None:
        self._close_program()
        if self._programs:
            sectors, counts = (np.concatenate(column) for column in zip(*self._programs, strict=True))
            order = np.lexsort((counts, sectors))  # the largest count of a sector is the last of its run
            last = np.append(np.diff(sectors[order]) > 0, True)
            self.launches.append(int(counts[order][last].sum()) * SECTOR)
        self._programs = []


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, and the number of programs on each axis."""

    kernel: str
    arguments: dict
    grid: tuple


@contextmanager
def observed(observer):
    """Show an observer every load, store and atomic of the kernels run inside, in the interpreter.

    Args:
        observer: has `begin_launch(launch)`, `end_launch()` and `touch(program, pointers, mask, size, writes)`: index
            of the program, addresses and which of them are used (arrays of one shape), bytes of an element, and whether
            they are written. An exception of its stops the kernel before the access.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"
    originals = {name: getattr(builder, name) for name in names} | {"__call__": executor.__call__}

    def touch(builder, pointers, mask, writes):
        # a mask that a scalar entered is of integers
        mask = np.ones_like(pointers.data, dtype=bool) if mask is None else mask.data.astype(bool)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        observer.touch(builder.grid_idx, pointers.data, np.broadcast_to(mask, pointers.data.shape), size, writes)

    def load(self, pointers, mask, *rest):
        touch(self, pointers, mask, False)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        touch(self, pointers, mask, True)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def update(self, operation, pointers, value, mask, *rest):
        touch(self, pointers, mask, True)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def exchange(self, pointers, *rest):
        touch(self, pointers, None, True)
        return originals["create_atomic_cas"](self, pointers, *rest)

    def launch(self, *args, **kwargs):
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.signature(self.fn).bind_partial(*args, **known).arguments
        observer.begin_launch(Launch(self.fn.__name__, dict(arguments), tuple(self.grid)))
        try:
            originals["__call__"](self, *args, **kwargs)
        finally:
            observer.end_launch()

    try:
        for name, hook in zip(names, (load, store, update, exchange), strict=True):
            setattr(builder, name, hook)
        executor.__call__ = launch
        yield observer
    finally:
        executor.__call__ = originals.pop("__call__")
        for name, original in originals.items():
            setattr(builder, name, original)


@contextmanager
def counted():
    """A `Traffic` that sees every load and store of the kernels run inside."""
    with observed(Traffic()) as traffic:
        yield traffic


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call whose bytes are counted.

    Args:
        op: the public op. label: what tells cases of one op apart, as `xray.counted_label` has it.
        call: given the activations and parameters, returns the op's result.
        activations, parameters: tensors; those of a floating dtype get a gradient.
        forward, backward: the least bytes.
        tokens: how many `saved` is divided by.
    """

    op: str
    label: str = ""
    call: Callable
    activations: tuple
    parameters: tuple = ()
    forward: int
    backward: int
    tokens: int = TOKENS


@dataclass(frozen=True, kw_only=True)
class Count:
    """Bytes moved forward and backward, each over its minimum, and bytes saved a token."""

    op: str
    label: str
    forward: int
    forward_over_minimum: float
    backward: int
    backward_over_minimum: float
    saved: float


def count(case: Case) -> Count:
    """Run a case forward and backward in the interpreter."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in (*case.activations, *case.parameters)]
    params, saved = {t.data_ptr() for t in tensors[len(case.activations) :]}, {}

    def keep(tensor):
        if tensor.data_ptr() not in params:
            saved[tensor.data_ptr(), tensor.shape] = tensor.nbytes
        return tensor

    with counted() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = case.call(*tensors)
    out = out[0] if isinstance(out, tuple) else out
    with counted() as backward:
        if out.requires_grad:
            torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out))
    return Count(
        op=case.op, label=case.label, saved=round(sum(saved.values()) / case.tokens, 1),
        forward=forward.bytes, forward_over_minimum=round(forward.bytes / case.forward, 3),
        backward=backward.bytes, backward_over_minimum=round(backward.bytes / max(case.backward, 1), 3),
    )  # fmt: skip


def cases() -> list[Case]:
    """A call of every op with a kernel, at the widths of BERT-base."""
    generator = torch.Generator().manual_seed(0)

    def half(*shape):
        return torch.randn(shape, generator=generator).half()

    def single(*shape):
        return torch.randn(shape, generator=generator)

    row = TOKENS * WIDTH * 2
    x, vector = half(TOKENS, WIDTH), single(WIDTH)
    found = [
        Case(
            op="dropout_add_norm", label="dropout",
            call=lambda x, r, w, b: dropout_add_norm(x, r, w, b, dropout=0.1, backend="triton"),
            activations=(x, half(TOKENS, WIDTH)), parameters=(vector, vector.clone()),
            forward=4 * row, backward=4 * row,
        ),
        Case(
            op="dropout_add_norm",
            call=lambda x, r, w, b: dropout_add_norm(x, r, w, b, backend="triton"),
            activations=(x, half(TOKENS, WIDTH)), parameters=(vector, vector.clone()),
            forward=4 * row, backward=3 * row,  # the gradients of x and residual are one
        ),
    ]  # fmt: skip
    for op, width in ((bias_gelu, WIDTH), (bias_geglu, 2 * WIDTH), (bias_swiglu, 2 * WIDTH)):
        wide = row * width // WIDTH
        found.append(
            Case(
                op=op.__name__, call=lambda x, b, op=op: op(x, b, backend="triton"),
                activations=(half(TOKENS, width),), parameters=(single(width),),
                forward=wide + row, backward=2 * wide + row,
            )
        )  # fmt: skip
    # the short form's backward does not read the output
    for length, rows, group in ((128, 3, 1), (256, 4, 1), (256, 4, 2)):
        heads, kv_heads, size = 2, 2 // group, 64
        qkv = half(2 * length, heads + 2 * kv_heads, size).split((heads, kv_heads, kv_heads), 1)
        cuts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        q, k = (x.nbytes for x in qkv[:2])
        found.append(
            Case(
                op="attention", label=f"S={length}" + " grouped" * (group > 1),
                call=lambda q, k, v, cuts, n=length: attention(q, k, v, cuts, n, dropout=0.1, backend="triton"),
                activations=(*qkv, cuts), forward=2 * q + 2 * k, backward=rows * q + 4 * k, tokens=2 * length,
            )
        )  # fmt: skip
    ids = torch.randint(1000, (TOKENS,), generator=generator)
    positions, types = torch.arange(TOKENS) % 128, torch.arange(TOKENS) // 64 % 2
    distinct, width = len(ids.unique()) + 128 + 2, WIDTH // 2

    def embed(i, t, p, *tables):
        with torch.autocast("cpu", torch.float16):  # float32 tables, a result of half their size
            return embed_norm(i, t, p, *tables, dropout=0.1, backend="triton")

    found.append(
        Case(
            op="embed_norm", call=embed, activations=(ids, types, positions),
            parameters=(*(single(n, width) for n in (1000, 128, 2)), single(width), single(width)),
            # the rows of the tables that occur are read, and in backward their gradients written
            forward=TOKENS * width * 2 + distinct * width * 4, backward=TOKENS * width * 2 + 2 * distinct * width * 4,
        )
    )  # fmt: skip
    # a row in registers, and one that is too wide
    for rows, classes, gradient in (
        (64, 16384, True),
        (64, 16384, False),
        (16, 30522, True),
        (16, 30522, False),
        (4, 119547, True),
        (4, 119547, False),
    ):
        labels = torch.randint(classes, (rows,), generator=generator)

        def loss(h, y, w, b, rows=rows, gradient=gradient):
            with torch.set_grad_enabled(gradient):
                return linear_cross_entropy(h, w, b, y, max_labels=rows, backend="triton")

        found.append(
            Case(
                op="linear_cross_entropy", label=f"V={classes}{' with gradient' * gradient}", call=loss,
                activations=(half(rows, 64), labels), parameters=(half(classes, 64), half(classes)),
                forward=((1 + gradient) * rows + 1) * classes * 2, backward=0, tokens=rows,  # and the bias
            )
        )  # fmt: skip
    cuts = torch.arange(0, TOKENS + 1, 64, dtype=torch.int32)
    mask = torch.ones(4, 64, dtype=torch.bool)
    moves = {
        "select_rows": (lambda x: select_rows(x, torch.arange(0, TOKENS, 2), backend="triton"), x, row, row),
        "pack": (lambda x: pack(x, mask, backend="triton"), x.view(4, 64, WIDTH), 2 * row, 2 * row),
        "unpack": (lambda x, cuts=cuts: unpack(x, cuts, 64, backend="triton"), x, 2 * row, 2 * row),
    }
    for op, (call, tensor, forward, backward) in moves.items():
        found.append(Case(op=op, call=call, activations=(tensor,), forward=forward, backward=backward))
    return [*found, *_mlm_mask_cases(), *_lamb_cases()]


def _mlm_mask_cases():
    special, ids = torch.arange(250) < 5, torch.arange(2048) * 7 % 250  # so few that all of a table is read
    continues, ordinary = torch.arange(250) % 4 == 0, torch.arange(5, 250)
    cuts = torch.arange(0, len(ids) + 1, 64, dtype=torch.int32)
    for unit in ("token", "word", "span"):
        known = {"special": special, "ordinary": ordinary} | ({"continues": continues} if unit == "word" else {})
        tables = sum(table.nbytes for table in known.values())
        yield Case(
            op="mlm_mask", label=unit,
            call=lambda i, unit=unit, known=known: mlm_mask(
                i, cuts, 64, mask_id=4, unit=unit, **known, backend="triton"
            ),
            activations=(ids,), forward=3 * ids.nbytes + tables, backward=0,
        )  # fmt: skip


def _lamb_cases():
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for adapt in (True, False):
            weights, moments = ([torch.zeros(64, WIDTH, dtype=t)] for t in (dtype, torch.float32))
            states = (weights, [weights[0].clone()], moments, [moments[0].clone()])
            yield Case(
                op="lamb_step", label=name + ("" if adapt else " without trust ratio"),
                call=lambda x, s=states, a=adapt: (lamb_step(*s, lr=1e-3, step=1, adapt=a, backend="triton"), x)[1:],
                activations=(moments[0],), forward=weights[0].numel() * least_bytes(dtype.itemsize), backward=0,
            )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minibert_kernels.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help='of "op label"')
    parser.add_argument("--json", action="store_true", help="one list of rows")
    args = parser.parse_args()
    if not AVAILABLE:
        print("traffic: error: needs Triton's interpreter: install triton (Linux only)", file=sys.stderr)
        return 2
    if not interpreting():  # decided when Triton is imported
        command = [sys.executable, "-m", "minibert_kernels.traffic", *sys.argv[1:]]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    rows = [count(case) for case in cases() if re.search(args.only, f"{case.op} {case.label}")]
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    for row in rows:
        print(
            f"{row.op:22} {row.label:14} fwd {row.forward_over_minimum:.3f} x  bwd {row.backward_over_minimum:.3f} x  "
            f"saved {row.saved:g} bytes a token"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
