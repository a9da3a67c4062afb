"""CUDA graphs: inputs at fixed addresses, work that is captured, and a pool of captured forward passes for inference.

A graph replays all launches of a pass at the cost of one: on short batches a GPU works faster than a host launches.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..batch import Batch
from .context import Output
from .encoder import Bert

ALIGNMENT = 256  # bytes, as of torch's allocator
LAUNCHED = 2  # calls of a work before its capture: the first compiles kernels, the second must not wait for the device
MAX_GRAPHS = 64  # of one `Graphs`: whatever comes later is launched op by op
POOLED = 4096  # tokens: of more, a GPU is busy for longer than the host
INPUTS = {"input_ids", "token_type_ids", "positions", "cu_seqlens", "seq_ids"}


class StaticInputs:
    """A padded batch at fixed addresses of a device, and tensors beside it, in one block that one copy fills.

    batch: its tensors lie in the block, and its `lengths` are those of the batch it was made for. beside: the others.
    """

    def __init__(self, batch: Batch, device: torch.device, **beside: Tensor):
        tensors, self.places, size = batch.tensors() | beside, {}, 0
        for name, x in tensors.items():
            self.places[name] = slice(size, size + x.numel() * x.element_size())
            size = -(-self.places[name].stop // ALIGNMENT) * ALIGNMENT
        self.block = torch.zeros(size, dtype=torch.uint8, device=device)
        views = {name: self._view(self.block, name, x) for name, x in tensors.items()}
        self.batch = dataclasses.replace(batch, **{name: views[name] for name in batch.tensors()})
        self.beside = {name: views[name] for name in beside}

    def _view(self, block: Tensor, name: str, like: Tensor) -> Tensor:
        return block[self.places[name]].view(like.dtype).view(like.shape)

    def load(self, batch: Batch, **beside: Tensor) -> None:
        """Fill the block, without waiting for the device; shapes and dtypes are those it was made for."""
        # new memory each time: torch gives pinned memory out again when the device has read it
        staged = torch.empty(self.block.shape, dtype=torch.uint8, pin_memory=self.block.is_cuda)
        for name, x in (batch.tensors() | beside).items():
            self._view(staged, name, x).copy_(x)
        self.block.copy_(staged, non_blocking=True)


def key_of(batch: Batch) -> tuple:
    """Equal for batches that the same `StaticInputs` can hold."""
    return batch.longest, *((name, x.dtype, x.shape) for name, x in batch.tensors().items())


class Graphs:
    """Captures work on one device, with one memory for all graphs: what one has left there, the next may overwrite.

    capturing: whether what runs now is captured, not run.
    """

    def __init__(self, device: torch.device):
        self.device, self.count, self.capturing = device, 0, False
        if device.type == "cuda":
            self.memory, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def call(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, which reads and writes fixed addresses only, as what may be replayed; itself on other devices."""
        return Captured(self, work) if self.device.type == "cuda" else work


class Captured:
    """Each call does what `work` does, from the third on by a graph.

    Raises:
        RuntimeError: in the second call, where something in it waits for the device, at its line.
    """

    def __init__(self, graphs: Graphs, work: Callable[[], None]):
        self.graphs, self.work, self.calls, self.graph = graphs, work, 0, None

    def __call__(self) -> None:
        if self.graph is None and self.calls >= LAUNCHED and self.graphs.count < MAX_GRAPHS:
            self.graph = self._capture()
        if self.graph is None:
            self._launch(watched=self.calls == LAUNCHED - 1)
        else:
            self.graph.replay()
        self.calls += 1

    def _capture(self) -> "torch.cuda.CUDAGraph":
        graphs, graph = self.graphs, torch.cuda.CUDAGraph()
        graphs.capturing = True
        try:
            with torch.cuda.graph(graph, pool=graphs.memory, stream=graphs.stream):
                self.work()
        finally:
            graphs.capturing = False
        graphs.count += 1
        return graph

    def _launch(self, watched: bool) -> None:
        """On the stream that captures: what libraries keep for a stream is there before the capture."""
        outside, mode = torch.cuda.current_stream(self.graphs.device), torch.cuda.get_sync_debug_mode()
        self.graphs.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.graphs.stream):
                if watched:
                    _set_sync_debug_mode("error")
                self.work()
        finally:
            if watched:
                _set_sync_debug_mode(mode)
        outside.wait_stream(self.graphs.stream)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings(action="ignore"):  # that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def check_paddable(model: nn.Module) -> None:
    """Raise ValueError for a model whose batches cannot be brought to the shape of a graph."""
    if not isinstance(model, Bert) or not model.paddable or getattr(model, "crf", None) is not None:
        what = "a CRF" if getattr(model, "crf", None) is not None else type(model).__name__
        raise ValueError(f"{what} cannot be captured as a CUDA graph: its result depends on more than each sequence")


class GraphPool:
    """A model in eval mode whose small batches are replayed as CUDA graphs: `pool(batch)` is `model(batch)`.

    There is a graph for each rounded shape of a batch (tokens, sequences, longest sequence), captured when it comes for
    the third time, or in `prepare`. Weights may change, but neither their addresses nor their dtype. Elsewhere than on
    a GPU the padded batch runs op by op.

    max_tokens: batches with more are passed to the model as they are.
    """

    def __init__(self, model: Bert, *, max_tokens: int = POOLED):
        check_paddable(model)
        self.model, self.max_tokens = model, max_tokens
        self.device = next(model.parameters()).device
        self.graphs, self.slots = Graphs(self.device), {}

    @torch.inference_mode(False)  # its tensors would be of no use outside
    @torch.no_grad()
    def __call__(self, batch: Batch) -> Output:
        """The packed forward pass, in tensors of the caller's own.

        Raises:
            ValueError: the model is in training mode, autocast is on, or the batch has targets.
        """
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast is on: a graph would read its casts after they are gone: cast the weights")
        if targets := batch.tensors().keys() - INPUTS:
            raise ValueError(f"the batch has {', '.join(sorted(targets))}: a pool takes batches without targets")
        if not 0 < batch.num_tokens <= self.max_tokens:
            return self.model(batch.to(self.device))
        shape = batch.shape.rounded(self.model.config.max_position_embeddings)
        if shape.num_tokens == shape.num_sequences:  # what an output is cut to is told by its length
            shape = dataclasses.replace(shape, num_tokens=shape.num_tokens + 1)
        padded = batch.padded(shape)
        slot = self.slots.get(key := key_of(padded))
        if slot is None:
            slot = self.slots[key] = Pass(self, padded)
        slot.inputs.load(padded)
        slot.forward()
        sizes = {shape.num_tokens: batch.num_tokens, shape.num_sequences: batch.num_sequences}
        return Output(**{name: x[: sizes[len(x)]].clone() for name, x in slot.output.items()})

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Capture the shapes of these batches, the largest first: the others find room in its memory."""
        for batch in sorted(batches, key=lambda batch: batch.num_tokens, reverse=True):
            for _ in range(LAUNCHED + 1):
                self(batch)


class Pass:
    """The inputs of batches of one shape, and their forward pass, which leaves its output at fixed addresses."""

    def __init__(self, pool: GraphPool, batch: Batch):
        self.model, self.inputs = pool.model, StaticInputs(batch, pool.device)
        self.output: dict[str, Tensor] = {}
        self.forward = pool.graphs.call(self._forward)

    def _forward(self) -> None:
        output = self.model(self.inputs.batch)
        self.output = {f.name: value for f in fields(output) if (value := getattr(output, f.name)) is not None}
