"""The launches that a piece of Python makes, recorded without a GPU: which variants of which kernels, and how often.

    with recorded(90, 132) as launches:
        step()  # on CPU tensors
    launches.variants

Triton's driver is replaced by one that claims to be a GPU: CPU tensors stand for tensors of that GPU, every op takes
its kernels, and instead of being compiled and launched these are written down. Nothing is computed: outputs of kernels
are whatever lay in memory. What Python and torch do on the host is what they do with a GPU, so this is also how the
host's time is measured.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

from ._triton import AVAILABLE, triton
from .dispatch import interpreting
from .launch import AotCase, Pose, pose, posing

KNOWN = ("num_warps", "num_stages")  # options of a launch that an `AotCase` has


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel as it was specialised for a launch: what Triton compiles once, and looks up at every further launch.

    Args:
        source: Triton's ASTSource, whose `hash()` names the code with all that is specialised.
        options: of the launch, all of them.
        grids: of its launches, in order.
    """

    source: object
    options: dict
    grids: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__

    def case(self, op: str, direction: str, label: str, matmul: bool) -> AotCase:
        """As a case that `xray` compiles."""
        attrs = {place: found for place, found in self.source.attrs.items() if found}
        return AotCase(
            op=op, direction=direction, label=label, fn=self.source.fn, signature=self.source.signature,
            constexprs=self.source.constants, attrs=attrs, matmul=matmul,
            **{name: self.options[name] for name in KNOWN},
        )  # fmt: skip


@dataclass
class Launches:
    """What was recorded: the variants in order of their first launch, and all launches by the variant's number."""

    variants: list[Variant] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(variant.grids) for variant in self.variants)

    def by_kernel(self) -> dict[str, list[Variant]]:
        found = {}
        for variant in self.variants:
            found.setdefault(variant.kernel, []).append(variant)
        return found


class _Driver:
    """What Triton asks a driver before and at a launch."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target, self.device = GPUTarget("cuda", capability, 32), ("recorded", capability)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device  # a key of the compiled kernels: no real device has it

    def get_current_stream(self, device):
        return 0


@contextmanager
def recorded(capability: int, multiprocessors: int):
    """`Launches` that fills while kernels are launched inside, on CPU tensors, as on a GPU of this architecture.

    Args:
        capability: e.g. 90. multiprocessors: how many a persistent grid fills.
    Raises:
        ValueError: Triton is missing or runs its interpreter, or launches are being recorded already.
    """
    if not AVAILABLE or interpreting():
        reason = "unset TRITON_INTERPRET" if AVAILABLE else "install triton (Linux only)"
        raise ValueError(f"launches are recorded with Triton's compiler: {reason}")
    if posing():
        raise ValueError("launches are being recorded already")
    import triton.compiler as compiler

    found, driver, active, compile_ = Launches(), triton.runtime.driver, triton.runtime.driver._active, compiler.compile
    stub = _Driver(capability)

    def record(source, target=None, options=None, **_):
        variant = Variant(source, dict(options))
        found.variants.append(variant)
        keep = variant.grids.append

        def run(x, y, z, *_):
            keep((x, y, z))

        return SimpleNamespace(run=run, launch_metadata=lambda *_: None, function=None, packed_metadata=None)

    # a kernel takes `compile` from there when it meets a device for the first time
    compiler.compile = record
    driver.set_active(stub)
    pose(Pose(capability, multiprocessors))
    try:
        yield found
    finally:
        pose(None)
        driver.set_active(active)
        compiler.compile = compile_
        for variant in found.variants:
            variant.source.fn.device_caches.pop(stub.device, None)
            variant.source.fn.variants.clear()
            variant.source.fn.compile = compile_
