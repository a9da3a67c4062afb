"""The norm slot: dropout, the residual sum and the normalisation in one call."""

import torch
from torch import Tensor, nn

from minibert_kernels import dropout_add_norm

from ..config import BertConfig
from .context import Context
from .linear import may_write_over_gradient


class LayerNorm(nn.Module):
    """norm(dropout(x) + residual), [T, D] to [T, D]; `site` names its dropout, None drops nothing."""

    kind = "layernorm"

    def __init__(self, config: BertConfig, site: int | None = None):
        super().__init__()
        self.eps, self.dropout, self.site = config.layer_norm_eps, config.hidden_dropout_prob, site
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if self.kind == "layernorm" else None

    def forward(self, x: Tensor, ctx: Context, residual: Tensor | None = None) -> Tensor:
        drop = {} if self.site is None else ctx.drop(self.dropout, self.site)
        rows = ctx.rows if drop else None
        # where nothing is dropped, the residual's gradient is that of x, too; a hook may have kept the residual
        if drop and residual is not None and not self._forward_pre_hooks:
            may_write_over_gradient(residual)
        return dropout_add_norm(
            x, residual, self.weight, self.bias, **drop, rows=rows, eps=self.eps, kind=self.kind, backend=ctx.backend
        )


class RMSNorm(LayerNorm):
    """The same with x / rms(x), without mean and bias (Zhang and Sennrich, 2019)."""

    kind = "rmsnorm"


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
