"""How an op meets torch: registered for whoever traces, called directly by whoever does not.

`torch.compile`, `torch.export`, fake tensors, dispatch modes and the profiler see an operator of the namespace
`minibert`. An eager call needs none, and crossing the dispatcher in Python costs the host more than the launch; it runs
the same function in a plain `torch.autograd.Function`, with the same bits.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


class Op:
    """An operator of torch, `minibert::name`.

    Args:
        name: of the operator.
        run: the implementation, annotated as `torch.library.custom_op` wants it; it mutates none of its arguments.
        fake: the same arguments to outputs of the same shapes and dtypes, uninitialised.
        save: (ctx, inputs, output), as `torch.autograd.Function.setup_context`; None for an op without a gradient.
        gradient: (ctx, *output gradients) to the gradients of all arguments.
    """

    def __init__(
        self, name: str, run: Callable, fake: Callable,
        *, save: Callable | None = None, gradient: Callable | None = None,
    ):  # fmt: skip
        self.name, self.run, self.apply = name, run, None
        self.registered = torch.library.custom_op(f"minibert::{name}", run, mutates_args=())
        self.registered.register_fake(fake)
        if gradient is not None:
            self.registered.register_autograd(gradient, setup_context=save)

            def forward(ctx, *args):
                output = run(*args)
                save(ctx, args, output)
                return output

            # a setup_context of its own would make each call inspect the signature of forward, for 30 us
            members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
            # its base's apply: Function's own looks for transforms of torch.func, which __call__ refuses, for 10 us
            self.apply = super(torch.autograd.Function, type(name, (torch.autograd.Function,), members)).apply
        else:
            self.registered.register_autograd(self._refuse_twice)

    def __call__(self, *args):
        """The outputs of `run`, with a gradient where there is one.

        Raises:
            NotImplementedError: a transform of torch.func, or forward-mode AD, asks for what is not there.
        """
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if transformed():
            self._refuse(args)
        if _traced(args):
            return self.registered(*args)
        if not torch.is_grad_enabled():
            return self.run(*args)
        if self.apply is not None:
            return self.apply(*args)
        # of a gradient that may be differentiated again: the registered operator refuses when it is
        again = any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        return (self.registered if again else self.run)(*args)

    def _refuse_twice(self, ctx, *_):
        raise NotImplementedError(f"minibert::{self.name} has no derivative of its own: use backend='reference'")

    def _refuse(self, args):
        remedy = "use backend='reference'"
        if forward_ad._current_level >= 0:
            for x in args:
                if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None:
                    raise NotImplementedError(f"minibert::{self.name} has no forward-mode derivative: {remedy}")
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"minibert::{self.name} does not run under the transforms of torch.func: {remedy}"
            )


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active, which a Function in Python does not serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _traced(args):
    """Whether somebody wants to see the operator: a profiler, a dispatch mode, or a tensor that is not a plain one.

    The first argument of every op is a tensor.
    """
    if torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack():
        return True
    return args[0].is_meta or not plain(frozenset(map(type, args)))


@cache
def plain(kinds: frozenset[type]) -> bool:
    """Whether none of these types is a subclass of Tensor that torch dispatches on, as fake tensors and DTensor are."""
    return all(kind in PLAIN or not issubclass(kind, torch.Tensor) for kind in kinds)
