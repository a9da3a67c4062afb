"""Watching a step without changing the model: ranges by module hooks, bytes and waits by a dispatch mode."""

import contextlib
import copy
import os
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..batch import Batch
from .step import Step

TORCH = str(Path(torch.__file__).parent) + os.sep
aten = torch.ops.aten
VIEWS = ("aten::detach", "aten::_unsafe_view")  # which torch does not call views
ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
LOOKUPS = ("aten::embedding", "aten::index_select", "aten::index", "aten::gather")
WRITERS = ("aten::copy_", "aten::fill_", "aten::zero_")
Mark = Callable[[str], contextlib.AbstractContextManager]


def name_of(path: str, module: nn.Module) -> str:
    """The name of a module's range: its dotted path, the root's class."""
    return path or type(module).__name__


@contextlib.contextmanager
def ranges(model: nn.Module, mark: Mark) -> Iterator[None]:
    """Open `mark(name)` around the forward of every module, by hooks that are gone afterwards."""
    open_ranges, handles = [], []

    def enter(name: str) -> None:
        open_ranges.append(mark(name))
        open_ranges[-1].__enter__()

    def leave() -> None:
        open_ranges.pop().__exit__(None, None, None)

    try:
        for path, module in model.named_modules():
            name = name_of(path, module)
            handles.append(module.register_forward_pre_hook(lambda module, args, name=name: enter(name)))
            handles.append(module.register_forward_hook(lambda module, args, output: leave(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Watch(TorchDispatchMode):
    """Shows every op to `see`; composite ones, which inference mode hands over whole, in their parts."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        return self.see(func, args, kwargs) if result is NotImplemented else result

    def see(self, func, args, kwargs):
        raise NotImplementedError


class Traffic(Watch):
    """Calls and bytes of every op by its name: each tensor that goes in or comes out; views and new memory move
    nothing."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def see(self, func, args, kwargs):
        result, name = func(*args, **kwargs), name_of_op(func)
        if not func.is_view and name not in VIEWS and name not in ALLOCATIONS:
            # of a table the rows that come out are read, and no others
            read = (result, *args[1:]) if name in LOOKUPS else args
            tensors = {id(x): x for x in tensors_of(read, kwargs)} | updated(func, args)
            written = {id(x): x for x in tensors_of(result) if id(x) not in tensors or name in LOOKUPS}
            self.calls[name] += 1
            self.bytes[name] += sum(map(stored_bytes, [*tensors.values(), *written.values()]))
        return result


def tensors_of(*tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def name_of_op(func) -> str:
    """As the profiler writes it."""
    return func.name().split(".")[0]


def updated(func, args) -> dict[tuple[str, int], Tensor]:
    """What an op in place reads and then writes; fills and copies only write, and so does anything into `out`."""
    if name_of_op(func) in WRITERS:
        return {}
    # `out` can only be given by its name; adamw's gradients are marked for the sake of a scaler that is not used here
    marked = [a.is_write and not a.kwarg_only and a.name != "grads" for a in func._schema.arguments]
    written = tensors_of([x for x, is_written in zip(args, marked, strict=False) if is_written])
    return {("written", id(x)): x for x in written}


def stored_bytes(x: Tensor) -> int:
    """Bytes that reading every element once touches; an expanded axis is stored once."""
    if x.layout != torch.strided:
        return 0
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()


def count_traffic(step: Step) -> Traffic:
    """Run one step, not the first: that one makes the optimizer's moments."""
    with Traffic() as traffic:
        step()
    return traffic


class HostReads(Watch):
    """Notes every op that makes the host wait for a device, and who called it.

    On the meta device, where there are no values, it answers with ones for bools and zeros elsewhere.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[str, str], int] = defaultdict(int)

    def see(self, func, args, kwargs):
        to_host = reads(func, args, kwargs)
        if (to_host or uploads(func, args, kwargs)) and not non_blocking(func, args, kwargs):
            self.found[caller(), name_of_op(func)] += 1
        if not to_host or "meta" not in {x.device.type for x in tensors_of(args, kwargs)}:
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            return args[0].fill_(0)
        args, kwargs = tree_map_only(Tensor, lambda x: made_up(x, "cpu"), (args, kwargs))
        result = func(*args, **kwargs)
        return result if func is aten._to_copy.default else tree_map_only(Tensor, lambda x: x.to("meta"), result)


def made_up(x: Tensor, device: str) -> Tensor:
    return (torch.ones if x.dtype == torch.bool else torch.zeros)(x.shape, dtype=x.dtype, device=device)


def ends(func, args, kwargs) -> tuple[bool, bool] | None:
    """Of a copy, whether it starts and whether it ends on the host; None for other ops."""
    if func is aten._to_copy.default:
        devices = args[0].device, torch.device(kwargs.get("device") or args[0].device)
    elif func is aten.copy_.default:
        devices = args[1].device, args[0].device
    else:
        return None
    return devices[0].type == "cpu", devices[1].type == "cpu"


def non_blocking(func, args, kwargs) -> bool:
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and any(args[2:])))


def uploads(func, args, kwargs) -> bool:
    """Whether this copies from the host to a device."""
    return ends(func, args, kwargs) == (True, False)


def reads(func, args, kwargs) -> bool:
    """Whether values on a device, or a size that follows from them, go to the host."""
    if (copied := ends(func, args, kwargs)) is not None:
        return copied == (False, True)
    if all(x.device.type == "cpu" for x in tensors_of(args, kwargs)):
        return False
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        # x[mask] = 0 hands CUDA a number that is on the host, and is a fill
        filled = len(args) > 2 and args[2].device.type == "cpu" and args[2].numel() == 1
        return not filled and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def caller() -> str:
    """The innermost line outside torch and this file, as `minibert/model/encoder.py:228`."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((TORCH, __file__, "<")):
            return f"{short(frame.filename)}:{frame.lineno}"
    return "?"


def short(file: str) -> str:
    """A file's path under the longest entry of `sys.path` that holds it."""
    path = Path(file).resolve()
    roots = [root for entry in sys.path if path.is_relative_to(root := Path(entry).resolve())]
    return str(path.relative_to(max(roots, key=lambda root: len(root.parts)))) if roots else path.name


def find_syncs(model: nn.Module, batch: Batch, **options) -> list[dict]:
    """What in one step would make the host wait for a GPU: [{"where": "file:line", "op", "calls"}], best empty.

    On CUDA a step runs as it is. Elsewhere it runs on the meta device: a tensor there has no values, so that whatever
    asks for one is found without a GPU, and checks that look at values on the host only are not mistaken for it.
    options: those of `Step`.
    Raises:
        RuntimeError: an op of the model knows no meta tensors.
    """
    if next(model.parameters()).device.type != "cuda":
        model, options = meta_twin(model), options | {"dtype": "float32"}
    step = Step(model, batch, **options)
    with HostReads() as reads:
        step()
    return [{"where": where, "op": op, "calls": calls} for (where, op), calls in reads.found.items()]


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy without values, hooks included, that takes no memory; it runs the reference implementation."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return twin
