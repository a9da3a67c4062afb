"""Instruments on Triton's interpreter: what a kernel that gives the right values on a small case may still do wrong.

guarded()           an access outside of the memory that a launch was given
without_races()     two programs touch an address, and one of them writes
few_programs()      of a long grid or loop only both ends: what a call with 2**31 elements does there
architecture(...)   the launch plans of another GPU
bfloat16()          bfloat16, whose bits the interpreter would multiply as integers
planted(...)        a kernel with another line of source, to see that an instrument finds the fault
"""

import builtins
import inspect
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from minibert_kernels import dispatch, launch
from minibert_kernels._triton import tl
from minibert_kernels.traffic import observed

PACKAGE = "minibert_kernels"


def modules():
    return [module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE and module is not None]


@contextmanager
def replaced(old, new):
    """Wherever a module of the package has the object `old` under a name, it finds `new`."""
    with pytest.MonkeyPatch.context() as patch:
        places = [(module, name) for module in modules() for name, value in vars(module).items() if value is old]
        assert places, f"no module of {PACKAGE} has {old}"
        for module, name in places:
            patch.setattr(module, name, new)
        yield


@dataclass
class Launches:
    """Remembers what was launched, and how often a plan asked for the architecture; the base of other observers."""

    seen: list = field(default_factory=list)
    asked: int = 0

    def begin_launch(self, launch):
        self.seen.append(launch)

    def end_launch(self):
        pass

    def touch(self, program, pointers, mask, size, writes):
        pass


def tensors_of(arguments):
    """All tensors among the arguments of a launch, which nest."""
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from tensors_of(argument)


def extent(tensor):
    """First byte, and byte past the last, that a kernel may touch: a contiguous tensor's own; of one with gaps, which
    an op may have made to read whole vectors, those of its storage."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


@dataclass
class Guard(Launches):
    more: tuple = ()

    def begin_launch(self, launch):
        super().begin_launch(launch)
        tensors = [*tensors_of(tuple(launch.arguments.values())), *self.more]
        self.extents = np.array(sorted(extent(t) for t in tensors if t.numel()), dtype=np.uint64)

    def touch(self, program, pointers, mask, size, writes):
        used = pointers[mask]
        # of the tensors that begin before an address, the one that ends last
        ends = np.maximum.accumulate(self.extents[:, 1])
        place = np.searchsorted(self.extents[:, 0], used, side="right")
        inside = (place > 0) & (used + np.uint64(size) <= ends[np.maximum(place, 1) - 1])
        if not inside.all():
            verb = "writes" if writes else "reads"
            raise AssertionError(f"{self.seen[-1].kernel}: program {program} {verb} outside of its tensors")


@contextmanager
def guarded(*more):
    """Refuse an access outside of the tensors that a kernel was launched with, and `more`, before it happens.

    Yields the `Launches`.
    """
    with observed(Guard(more=more)) as guard:
        yield guard


@dataclass
class Races(Launches):
    found: list = field(default_factory=list)

    def begin_launch(self, launch):
        super().begin_launch(launch)
        self.accesses, self.program = [], None

    def touch(self, program, pointers, mask, size, writes):
        used = np.unique(pointers[mask])
        if program != self.program:
            self.program, self.written = program, []
        if writes:
            self.written.append(used)
        elif self.written and np.isin(used, np.concatenate(self.written)).any():
            self.found.append(f"{self.seen[-1].kernel}: program {program} reads what other threads of it have written")
        index = np.ravel_multi_index(program, self.seen[-1].grid + (1,) * (3 - len(self.seen[-1].grid)))
        for byte in range(0, size, 2):  # no two types overlap by a single byte
            self.accesses.append((used + np.uint64(byte), np.full(len(used), index), np.full(len(used), writes)))

    def end_launch(self):
        if not self.accesses:
            return
        address, program, writes = (np.concatenate(column) for column in zip(*self.accesses, strict=True))
        order = np.argsort(address, kind="stable")
        address, program, writes = address[order], program[order], writes[order]
        first = np.flatnonzero(np.append(True, np.diff(address) > 0))
        shared = np.minimum.reduceat(program, first) < np.maximum.reduceat(program, first)
        racing = shared & np.logical_or.reduceat(writes, first)
        if racing.any():
            at = first[racing][0]
            programs = sorted(set(program[address == address[at]].tolist()))
            self.found.append(
                f"{self.seen[-1].kernel}: programs {programs[:4]} share an address that one of them writes "
                f"({racing.sum()} bytes in all)"
            )


@contextmanager
def without_races():
    """Refuse, at the end, kernels of which two programs touched one address while at least one of them wrote there, or
    one read what it had written: no barrier stands between the threads of a program.

    Yields the `Launches`.
    """
    with observed(Races()) as races:
        yield races
    assert not races.found, "; ".join(races.found)


@contextmanager
def few_programs(ends=4, limit=64):
    """Loops and grids of more than `limit` steps run their first and last `ends`, so that a call whose tensors have
    2**31 elements takes milliseconds. What lies between is neither computed nor touched."""
    from triton.runtime import interpreter

    def few(*bounds):
        steps = builtins.range(*map(int, bounds))
        steps = [*steps[:ends], *steps[-ends:]] if len(steps) > limit else steps
        # a compiled loop counts in the type of its bounds, the interpreter's in Python's integers
        wide = any(isinstance(bound, tl.tensor) and bound.dtype == tl.int64 for bound in bounds)
        return (int64(step) for step in steps) if wide else steps

    def int64(value):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)

    with pytest.MonkeyPatch.context() as patch:
        # a kernel's range() and tl.range(), and the interpreter's own over the grid
        for module in (*modules(), interpreter):
            patch.setattr(module, "range", few, raising=False)
        yield
    # the interpreter gives its own names to the module of each kernel that it reads
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("range") is few:
            del module.range


@contextmanager
def architecture(capability, float32=False):
    """The launch plans of a GPU of this capability; those of its float32 tensors too, where the interpreter takes the
    larger ones of 16-bit tensors by default. Yields the `Launches`, whose tiles a test should look at."""
    launches = Launches()

    def found(device):
        launches.asked += 1
        return capability

    with ExitStack() as stack:
        stack.enter_context(replaced(launch.capability, found))
        if float32:
            module = sys.modules[f"{PACKAGE}.attention"]
            stack.enter_context(replaced(module._element_size, lambda q: 4))
        yield stack.enter_context(observed(launches))


def to_float32(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x):
    """The bits of float32 values rounded to the nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@contextmanager
def bfloat16():
    """Let kernels take bfloat16 in the interpreter: products of matrices multiply the values and add in float32, other
    arithmetic is that of float32 rounded to nearest even, and so are conversions, which it truncates."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x):
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def wide(x):
        return handle(to_float32(x.data), tl.float32) if is_bf16(x) else x

    def arithmetic(method):
        def run(self, *args):
            if not any(map(is_bf16, args)):
                return method(self, *args)
            result = method(self, *map(wide, args))
            # comparisons give booleans under the type of their operands
            return handle(to_bfloat16(result.data), tl.bfloat16) if result.data.dtype == np.float32 else result

        return run

    def convert(method):
        def run(self, x, target, *rest):
            if target.scalar == tl.bfloat16 and not is_bf16(x):
                return handle(to_bfloat16(x.data), tl.bfloat16)
            if is_bf16(x) and target.scalar != tl.bfloat16:
                x = wide(x)
                return x if target.scalar == tl.float32 else method(self, x, target, *rest)
            return method(self, x, target, *rest)

        return run

    def dot(self, a, b, d, *rest):
        return plain_dot(self, wide(a), wide(b), d, *rest)

    plain_dot = builder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cast_impl", "create_fp_to_fp"):
            patch.setattr(builder, name, convert(getattr(builder, name)))
        for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt"):
            patch.setattr(builder, name, arithmetic(getattr(builder, name)))
        patch.setattr(builder, "create_dot", dot)
        patch.setattr(builder, "get_bf16", lambda self, value: handle(to_bfloat16([value]), tl.bfloat16), raising=False)
        # what it can do for float16 it can now do for bfloat16
        missing = dispatch._missing
        half = {torch.bfloat16: torch.float16}
        patch.setattr(dispatch, "_missing", lambda device, dtype, now: missing(device, half.get(dtype, dtype), now))
        yield


@contextmanager
def planted(kernel, changes, folder):
    """Run the package with other source in one kernel, or function of a kernel.

    Args:
        kernel: the `@triton.jit` function.
        changes: {text that occurs once: what stands there instead}.
        folder: for the file of the new source, which the interpreter reads.
    """
    source = inspect.getsource(kernel.fn)
    for old, new in changes.items():
        count = source.count(old)
        assert count == 1, f"{kernel.fn.__name__} has {old!r} {count} times: plant the fault in another place"
        source = source.replace(old, new)
    path = folder / f"{kernel.fn.__name__}.py"
    path.write_text(source)
    # with the names of its module: what it calls, and what a test has replaced there
    names, name = sys.modules[kernel.fn.__module__].__dict__, kernel.fn.__name__
    try:
        exec(compile(source, str(path), "exec"), names)
        faulty = names[name]
    finally:
        names[name] = kernel
    with replaced(kernel, faulty):
        yield
