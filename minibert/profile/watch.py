"""Watching a step without changing the model: ranges by module hooks, bytes and waits by a dispatch mode."""

import contextlib
import copy
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

TORCH = str(Path(torch.__file__).parent)
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


class Traffic(TorchDispatchMode):
    """Bytes of every op: each tensor that goes in and each that comes out, once; views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() != "aten::detach":
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            self.bytes[func.name().split(".")[0]] += sum(map(stored_bytes, tensors.values()))
        return result


def stored_bytes(x: Tensor) -> int:
    """Bytes that reading every element once touches; an expanded axis is stored once."""
    if x.layout != torch.strided:
        return 0
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()


def count_traffic(step: Step) -> Counter[str]:
    """Run one step; bytes by op name, as the profiler writes it."""
    with Traffic() as traffic:
        step()
    return traffic.bytes


class HostReads(TorchDispatchMode):
    """Notes every op that makes the host wait for values on a device, and who called it.

    On the meta device, where there are no values, it answers with ones for bools and zeros elsewhere.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        away = [x for x in tensors if x.device.type != "cpu"]
        if not away or not waits(func, args, kwargs, tensors):
            return func(*args, **kwargs)
        self.found[caller(), func.name().split(".")[0]] += 1
        if away[0].device.type != "meta":
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0].fill_(0)
        here = tree_map_only(Tensor, lambda x: made_up(x, "cpu"), (args, kwargs))
        to_host = func is torch.ops.aten._to_copy.default
        return tree_map_only(Tensor, lambda x: x if to_host else x.to("meta"), func(*here[0], **here[1]))


def made_up(x: Tensor, device: str) -> Tensor:
    return (torch.ones if x.dtype == torch.bool else torch.zeros)(x.shape, dtype=x.dtype, device=device)


def waits(func, args, kwargs, tensors: list[Tensor]) -> bool:
    """Whether the host must have a value, or a size that follows from values, before this op returns."""
    aten = torch.ops.aten
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu" and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        return args[0].device.type == "cpu" and not non_blocking
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
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
