"""A linear layer whose input goes on as a residual: in backward, one product adds the gradients of both ways."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert_kernels import reference
from minibert_kernels.launch import posing
from minibert_kernels.op import plain, transformed

from .context import Context

WORTH = 2**22  # elements of x: below, a GPU adds two gradients sooner than the host has called a Function in Python


def project(linear: nn.Module, x: Tensor, ctx: Context) -> Tensor:
    """linear(x); a plain nn.Linear without hooks, which would see one gradient of two, is a `product`."""
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    if type(linear) is not nn.Linear or watched or nn.modules.module._has_any_global_hook():
        return linear(x)
    return product(x, linear.weight, linear.bias, ctx)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, ctx: Context) -> Tensor:
    """F.linear(x, weight, bias), after which `ctx.residual(x)` is x with a gradient that costs no sum of its own.

    A backward hook of a module around it sees the gradient by this alone: hooks have their own view of x, and then
    the residual is x.
    """
    y, residual = linear_with_residual(x, weight, bias)
    if residual is not x:
        ctx.forks.append((x, residual))
    return y


def linear_with_residual(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """F.linear(x, weight, bias), and x for whoever else needs it.

    Where x is used in two places, autograd adds their two gradients: it reads both and writes a third. Here the product
    that makes one of them begins with the other, and rounds once: dx = dresidual + dy · weight, written over dresidual
    after `may_write_over_gradient`. Everything else (autocast, second derivatives, the gradients of weight and bias)
    equals F.linear's. Where nothing would be saved it calls F.linear and returns x itself: without a gradient, in
    `torch.compile`, which fuses the sum, and for inputs that autocast still has to cast.

    Args:
        x: [..., in], floating. weight: [out, in]. bias: [out] or None.
    Returns:
        [..., out], and a view of x.
    """
    if not _forks(x, weight, bias):
        return F.linear(x, weight, bias), x
    # cast here, where autograd records it: a cast inside the Function would enter autocast's cache without a gradient
    return _apply(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def untouched(*tensors: Tensor | None) -> bool:
    """Whether a Function in Python may work on these: nobody traces or transforms what is done, and no subclass of
    Tensor does it in its own way."""
    return not torch.compiler.is_compiling() and not transformed() and plain(frozenset(map(type, tensors)))


def _forks(x, weight, bias):
    if not (torch.is_grad_enabled() and x.requires_grad and x.ndim > 1 and untouched(x, weight, bias)):
        return False
    if (x.is_cuda or posing()) and x.numel() < WORTH:
        return False
    if reference.under_autocast(x):
        return x.dtype == reference.autocast_dtype(x)
    return all(p is None or p.dtype == x.dtype for p in (weight, bias))


class _Fork(torch.autograd.Function):
    """(x weightᵀ + bias, x)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.writes_over = False
        return F.linear(x, weight, bias), x

    @staticmethod
    def backward(ctx, dy, dresidual):
        if dy is None:
            return dresidual, None, None
        x, weight = ctx.saved_tensors
        rows, dx, dweight, dbias = dy.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            total = None if dresidual is None else dresidual.reshape(-1, x.shape[-1])
            if total is None:
                dx = rows @ weight
            elif ctx.writes_over and dresidual.is_contiguous() and not torch.is_grad_enabled():
                dx = torch.addmm(total, rows, weight, out=total)  # counters of FLOPs do not know addmm_
            else:  # on a GPU torch copies it first (at least up to 2.13), and nothing is saved
                dx = torch.addmm(total, rows, weight)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


# its base's apply: Function's own looks for transforms of torch.func, which `untouched` has done
_apply = super(torch.autograd.Function, _Fork).apply


def may_write_over_gradient(residual: Tensor) -> None:
    """Say that the gradient of `residual` will be memory that its one user makes for it and gives to nobody else."""
    if torch.compiler.is_compiling():
        return
    node = residual.grad_fn
    if getattr(node, "_forward_cls", None) is _Fork and residual.output_nr == 1:
        node.writes_over = True
