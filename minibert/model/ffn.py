"""The feed-forward slot: [T, D] to [T, D]."""

from torch import Tensor, nn

from minibert_kernels import bias_geglu, bias_gelu, bias_swiglu

from ..config import BertConfig

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


class MLP(nn.Module):
    """down(gelu(up(x))) (Devlin et al., 2019); `hidden_act` says which gelu."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.approximate = APPROXIMATE[config.hidden_act]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(bias_gelu(self.up(x), None, approximate=self.approximate))


class GeGLU(nn.Module):
    """down(gelu(a) * b), where up(x) = [a, b] (Shazeer, 2020); `intermediate_size` is the width of a."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.approximate = APPROXIMATE[config.hidden_act]
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x)))

    def gate(self, x: Tensor) -> Tensor:
        return bias_geglu(x, None, approximate=self.approximate)


class SwiGLU(GeGLU):
    """down(silu(a) * b), where up(x) = [a, b] (Shazeer, 2020)."""

    def gate(self, x: Tensor) -> Tensor:
        return bias_swiglu(x, None)


FFNS = {"mlp": MLP, "geglu": GeGLU, "swiglu": SwiGLU}
