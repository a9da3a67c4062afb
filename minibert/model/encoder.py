"""Embeddings, blocks, encoder, pooler, and `BertModel`, which puts them together."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minibert_kernels import attention_schedule, embed_norm, select_rows
from minibert_kernels.dispatch import use_triton

from .. import hub
from ..batch import Batch, pack_padded, unpack
from ..config import BertConfig, one_of
from .attention import Attention
from .context import Context, Output, site_seeds
from .ffn import FFNS
from .lora import low_rank, merged
from .norm import NORMS
from .position import POSITIONS, Position

SCHEDULED = 128  # shorter sequences are one tile each: there is nothing to balance
SITES = 3  # dropout sites of a block: attention map, after attention, after feed-forward; site 0 is the embeddings


class Embeddings(nn.Module):
    """Token ids [T] to normalised embeddings [T, D] (Devlin et al., 2019, figure 2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = part("position", POSITIONS, config)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = NORMS["layernorm"](config)

    def forward(self, ctx: Context) -> Tensor:
        batch = ctx.batch
        drop = ctx.drop(self.config.hidden_dropout_prob, 0)
        return embed_norm(
            batch.input_ids, batch.token_type_ids, batch.positions,
            self.word.weight, self.position.weight, self.token_type.weight, self.norm.weight, self.norm.bias,
            **drop, rows=ctx.rows, eps=self.norm.eps, backend=ctx.backend,
        )  # fmt: skip


class PostNormBlock(nn.Module):
    """norm(x + f(x)) for attention, then for the feed-forward part: BERT's order."""

    def __init__(self, config: BertConfig, layer: int):
        super().__init__()
        site = 1 + SITES * layer
        self.attention = Attention(config, site)
        self.attention_norm = part("norm", NORMS, config, site + 1)
        self.ffn = part("ffn", FFNS, config)
        self.ffn_norm = part("norm", NORMS, config, site + 2)

    def forward(self, x: Tensor, ctx: Context, position: Position, maps: list[Tensor] | None = None) -> Tensor:
        y = self.attention(x, ctx, position, maps)
        x = self.attention_norm(y, ctx, residual=ctx.residual(x))
        y = self.ffn(x, ctx)
        return self.ffn_norm(y, ctx, residual=ctx.residual(x))


BLOCKS = {"post": PostNormBlock}


class Encoder(nn.Module):
    """`num_hidden_layers` blocks, [T, D] to [T, D].

    recompute: keep the input of each block alone, and compute the block again in the backward pass (Chen et al., 2016):
        the same bits, since dropout is drawn from counters, in less memory and a third more time.
    """

    recompute = False

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layers = nn.ModuleList(part("block", BLOCKS, config, layer) for layer in range(config.num_hidden_layers))

    def forward(self, x, ctx, position, states: list | None = None, maps: list | None = None) -> Tensor:
        """`states` and `maps`, where given, receive every layer's input and output, and every attention map."""
        for layer in self.layers:
            if states is not None:
                states.append(x)
            if self.recompute and maps is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, ctx, position, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, ctx, position, maps)
        if states is not None:
            states.append(x)
        return x


class Pooler(nn.Module):
    """tanh(dense(the state of [CLS])): [T, D] to [B, D]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return torch.tanh(self.dense(first_tokens(x, ctx)))


class Bert(nn.Module):
    """What all models share: loading, saving, and the door where the Hugging Face call is packed and unpacked."""

    config: BertConfig
    backend: str
    new_parameters: tuple[str, ...] = ()
    objective = ""  # names the Hugging Face class in config.json
    paddable = True  # empty sequences behind a batch change nothing of what it gives: see `Batch.padded`
    in_transformers = True  # whether transformers has a class of this name

    @classmethod
    def example_targets(cls, config: BertConfig, lengths: Tensor, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Random targets of a batch to profile or benchmark a training step on, by the names of `Batch`'s fields.

        Args:
            lengths: int64 [B], the tokens of each sequence. draw: (high, *shape) to integers below high.
        Raises:
            ValueError: the model has no head to train.
        """
        raise ValueError(f"{cls.objective} has no head to train: use mode='infer'")

    @classmethod
    def example_inputs(cls, lengths: Tensor) -> dict[str, Tensor]:
        """Further fields that a batch of this head needs, in training and in inference."""
        return {}

    @classmethod
    def from_pretrained(cls, directory, **options):
        """A model with the weights of a Hugging Face directory; see `minibert.hub.from_pretrained` for the options."""
        return hub.from_pretrained(cls, directory, **options)

    def save_pretrained(self, directory, tokenizer=None, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Write a directory that Hugging Face's BERT loads; see `minibert.hub.save_pretrained`."""
        hub.save_pretrained(self, directory, tokenizer, merged(self, parameters or dict(self.named_parameters())))

    def __call__(self, *args, return_dict: bool = True, **kwargs) -> Output | tuple:
        """`forward`; with `return_dict=False` the fields that are there, as a tuple."""
        output = super().__call__(*args, **kwargs)
        return output if return_dict else output.to_tuple()

    def num_parameters(self) -> int:
        """As many as `save_pretrained` writes, a tied weight once."""
        added = sum(layer.a.numel() + layer.b.numel() for _, layer in low_rank(self))
        return sum(p.numel() for p in self.parameters()) - added

    @property
    def dropout_sites(self) -> int:
        """That of the embeddings, of all blocks, and of a head."""
        return 2 + SITES * self.config.num_hidden_layers

    def context(self, batch: Batch, seed: int | Tensor | None) -> Context:
        check_batch(self.config, batch)
        schedule = None
        if batch.max_seqlen > SCHEDULED and use_triton("attention", self.backend, batch.input_ids):
            schedule = attention_schedule(batch.cu_seqlens, batch.num_tokens)
        if not self.training:
            return Context(batch, self.backend, schedule=schedule)
        seeds = site_seeds(seed, self.dropout_sites, batch.input_ids.device)[:, 0]
        return Context(batch, self.backend, seeds, batch.rows, schedule)


class BertModel(Bert):
    """The encoder, with or without pooler.

    `model(batch)` takes a packed `Batch` and returns [T, D] states; `model(input_ids, attention_mask, token_type_ids)`
    takes Hugging Face's [B, S] layout and returns [B, S, D], zero at padding.
    """

    objective = "BertModel"

    def __init__(self, config: BertConfig, *, add_pooler: bool = True, backend: str = "auto"):
        super().__init__()
        self.config, self.backend = config, backend
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooler else None
        initialise(self, config)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, *,
        seed=None, output_hidden_states: bool = False, output_attentions: bool = False,
    ) -> Output:  # fmt: skip
        """See the class; `seed` is this step's dropout seed, None draws one from torch's generator.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary (checked on CPU), sequences too long.
        """
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        output = self.encode(self.context(batch, seed), output_hidden_states, output_attentions)
        return output if mask is None else leave(output, mask)

    def encode(self, ctx: Context, output_hidden_states: bool = False, output_attentions: bool = False) -> Output:
        """The packed forward pass."""
        states = [] if output_hidden_states else None
        maps = [] if output_attentions else None
        x = self.encoder(self.embeddings(ctx), ctx, self.embeddings.position, states, maps)
        return Output(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x, ctx),
            hidden_states=None if states is None else tuple(states),
            attentions=None if maps is None else tuple(maps),
        )


def initialise(module: nn.Module, config: BertConfig) -> None:
    """Truncated normal weights, zero biases, as Devlin et al. (2019)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=config.initializer_range)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def part(slot: str, table: dict[str, Callable], config: BertConfig, *args) -> nn.Module:
    """Build what `config` names for a slot."""
    name = getattr(config, slot)
    one_of(slot, name, table)
    return table[name](config, *args)


def first_tokens(x: Tensor, ctx: Context) -> Tensor:
    """The state of each sequence's first token, [T, D] to [B, D]; zero for a sequence without tokens."""
    batch = ctx.batch
    if batch.min_seqlen > 0:
        return select_rows(x, batch.first_rows, backend=ctx.backend)
    if batch.num_tokens == 0:
        return x.new_zeros(batch.num_sequences, x.shape[-1])
    first = select_rows(x, batch.first_rows.clamp(max=batch.num_tokens - 1), backend=ctx.backend)
    return first.masked_fill((batch.cu_seqlens.diff() == 0)[:, None], 0)


def enter(input_ids, attention_mask=None, token_type_ids=None, position_ids=None) -> tuple[Batch, Tensor | None]:
    """The door: a packed batch as it is, or the Hugging Face layout packed, with the mask that undoes it."""
    if isinstance(input_ids, Batch):
        if any(x is not None for x in (attention_mask, token_type_ids, position_ids)):
            raise ValueError("a packed Batch carries its own masks, types and positions: pass it alone")
        return input_ids, None
    return pack_padded(input_ids, attention_mask, token_type_ids, position_ids)


def leave(output: Output, mask: Tensor) -> Output:
    """Give an output the caller's [B, S] shape."""
    for name in ("last_hidden_state", "prediction_logits"):
        value = getattr(output, name)
        if value is not None:
            setattr(output, name, unpack(value, mask))
    if output.hidden_states is not None:
        output.hidden_states = tuple(unpack(state, mask) for state in output.hidden_states)
    if output.attentions is not None:
        output.attentions = tuple(spread(probs, mask) for probs in output.attentions)
    return output


def spread(probs: Tensor, mask: Tensor) -> Tensor:
    """Attention maps [B, H, n, n] of packed tokens to [B, H, S, S], where those tokens lie in the caller's rows."""
    if mask.all():
        return probs
    full = probs.new_zeros(*probs.shape[:2], mask.shape[1], mask.shape[1])
    for sequence, (row, source) in enumerate(zip(mask, probs, strict=True)):
        index = row.nonzero().squeeze(1)
        full[sequence][:, index[:, None], index] = source[:, : len(index), : len(index)]
    return full


def check_batch(config: BertConfig, batch: Batch) -> None:
    """Refuse what would read outside a table. Ids are looked at on the CPU only: on a GPU that would wait for it."""
    limit = config.max_position_embeddings
    if batch.max_seqlen > limit:
        raise ValueError(f"a sequence has {batch.max_seqlen} tokens, max_position_embeddings={limit}: truncate it")
    if batch.input_ids.device.type != "cpu" or batch.num_tokens == 0 or torch.compiler.is_compiling():
        return
    ranges = {"input_ids": config.vocab_size, "token_type_ids": config.type_vocab_size, "positions": limit}
    for name, size in ranges.items():
        low, high = getattr(batch, name).aminmax()
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {int(low if low < 0 else high)}: expected 0 to {size - 1}")
