"""The feed-forward slot: [T, D] to [T, D]."""

from collections.abc import Callable

from torch import Tensor, nn

from minibert_kernels import bias_geglu, bias_gelu, bias_swiglu
from minibert_kernels.dispatch import use_triton

from ..config import BertConfig
from .context import Context
from .linear import product, project
from .lora import LowRank

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activated(op: Callable, linear: nn.Linear, x: Tensor, ctx: Context, **options) -> Tensor:
    """op(linear(x)): a kernel adds the bias itself and sums its gradient on the way, else the product does."""
    if use_triton(op.__name__, ctx.backend, x):
        y = product(x, linear.weight, None, ctx)
        if isinstance(linear, LowRank):
            y = y + linear.addition(x)
        return op(y, linear.bias, **options, backend=ctx.backend)
    return op(project(linear, x, ctx), None, **options, backend="reference")


class MLP(nn.Module):
    """down(gelu(up(x))) (Devlin et al., 2019); `hidden_act` says which gelu."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.approximate = APPROXIMATE[config.hidden_act]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.down(activated(bias_gelu, self.up, x, ctx, approximate=self.approximate))


class GeGLU(nn.Module):
    """down(gelu(a) * b), where up(x) = [a, b] (Shazeer, 2020); `intermediate_size` is the width of a."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.approximate = APPROXIMATE[config.hidden_act]
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.down(activated(bias_geglu, self.up, x, ctx, approximate=self.approximate))


class SwiGLU(GeGLU):
    """down(silu(a) * b), where up(x) = [a, b] (Shazeer, 2020)."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.down(activated(bias_swiglu, self.up, x, ctx))


FFNS = {"mlp": MLP, "geglu": GeGLU, "swiglu": SwiGLU}
