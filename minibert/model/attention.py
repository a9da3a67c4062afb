"""Multi-head self-attention over packed sequences (Vaswani et al., 2017, section 3.2)."""

from einops import rearrange
from torch import Tensor, nn

from minibert_kernels import attention, attention_probs

from ..config import BertConfig
from .context import Context
from .linear import project
from .position import Position


class Attention(nn.Module):
    """[T, D] to [T, D]; every token attends to the tokens of its own sequence, to earlier ones and itself if causal."""

    def __init__(self, config: BertConfig, site: int):
        super().__init__()
        self.num_heads, self.site = config.num_attention_heads, site
        self.dropout, self.causal = config.attention_probs_dropout_prob, config.causal
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, ctx: Context, position: Position, maps: list[Tensor] | None = None) -> Tensor:
        """`maps`, where given, receives the attention map [B, H, S, S], before dropout."""
        batch = ctx.batch
        qkv = rearrange(project(self.qkv, x, ctx), "t (three h d) -> t three h d", three=3, h=self.num_heads)
        qkv = position.rotate(qkv, batch)
        bias, slopes = position.score_bias(batch), position.slopes(batch)
        seen = {"score_bias": bias, "alibi_slopes": slopes, "causal": self.causal}
        if maps is not None:
            q, k, _ = qkv.unbind(1)
            maps.append(attention_probs(q, k, batch.cu_seqlens, batch.max_seqlen, **seen))
        drop = ctx.drop(self.dropout, self.site)
        out = attention(
            qkv, None, None, batch.cu_seqlens, batch.max_seqlen,
            **drop, **seen, seq_ids=batch.seq_ids, schedule=ctx.schedule, backend=ctx.backend,
        )  # fmt: skip
        return self.out(rearrange(out, "t h d -> t (h d)"))
