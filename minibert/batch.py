"""The packed batch: tokens of many sequences in one row, with the borders beside them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ROWS = ("mlm_rows", "token_rows")
ROW_SHIFT = 20  # a token's dropout counter is seq_id << 20 | position: 1 M positions a sequence
IGNORE = -100
SHORTEST = 32  # the least bound of lengths of a rounded shape: shorter sequences share one


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T packed tokens of B sequences. Lengths stay on the host, so that no step has to ask the device for them.

    input_ids, token_type_ids, positions: [T] int64.
    cu_seqlens: [B + 1] int32, sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
    lengths: B host integers.
    seq_ids: [B] int64, names each sequence whatever batch it sits in: dropout is keyed on it.
    mlm_rows, mlm_labels: [M] int64, the rows to predict a token from, and that token: what was masked there, or, of a
        causal model, what comes next.
    nsp_labels: [B] int64, 0 where B follows A, 1 where it is random (Hugging Face's order).
    sop_labels: [B] int64, 0 where B follows A, 1 where A follows B.
    labels: [B] int64 classes, [B] float targets (regression), [B, num_labels] float (multi-label), [B, 2] int64 first
        and last token of an answer, counted within its sequence, or, where B is Q questions of as many choices each,
        [Q] int64 right choices.
    token_rows, token_labels: [N] int64, the rows whose states a head reads, and the class of each, -100 for none.
    longest: an upper bound of the lengths, where nothing on the host may depend on them: then any sequence may be
        empty, and there may be tokens behind the last one, which are of no sequence.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    seq_ids: Tensor
    mlm_rows: Tensor | None = None
    mlm_labels: Tensor | None = None
    nsp_labels: Tensor | None = None
    sop_labels: Tensor | None = None
    labels: Tensor | None = None
    token_rows: Tensor | None = None
    token_labels: Tensor | None = None
    longest: int | None = None

    def __post_init__(self):
        # plain integers, so that a compiled model is not bound to these very lengths
        bound = self.longest
        object.__setattr__(self, "max_seqlen", max(self.lengths, default=0) if bound is None else bound)
        object.__setattr__(self, "min_seqlen", min(self.lengths, default=0) if bound is None else 0)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> Tensor:
        """[T] int64: one counter a token, the same in every batch."""
        return self.seq_ids[self.sequences.clamp(max=self.num_sequences - 1)] << ROW_SHIFT | self.positions

    @property
    def sequences(self) -> Tensor:
        """[T] int64: the number of each token's sequence; B behind the last one."""
        token = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], token, right=True)

    @property
    def first_rows(self) -> Tensor:
        """[B] int64: where each sequence's [CLS] lies; of an empty sequence, where the next one begins."""
        return self.cu_seqlens[:-1].long()

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors and there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device) -> "Batch":
        """The same batch on another device; copies do not wait for each other."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    @property
    def shape(self) -> "Shape":
        count = {name: 0 if getattr(self, name) is None else len(getattr(self, name)) for name in ROWS}
        return Shape(num_tokens=self.num_tokens, num_sequences=self.num_sequences, max_seqlen=self.max_seqlen, **count)

    def padded(self, shape: "Shape") -> "Batch":
        """The same batch in `shape`: with tokens behind the last sequence, empty sequences, and targets to ignore.

        No loss and no gradient changes, but for the order of sums.
        Raises:
            ValueError: the batch is larger than shape, or has targets of which none can be ignored: numbers, several
                labels at once, labels of groups of sequences, or token_rows without token_labels.
        """
        for name, size in vars(self.shape).items():
            if size > getattr(shape, name):
                raise ValueError(f"{name}={size} of the batch is above {getattr(shape, name)} of the shape")
        labels = self.labels
        if labels is not None and (labels.is_floating_point() or len(labels) != self.num_sequences):
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: only classes of sequences can be padded")
        if self.token_rows is not None and self.token_labels is None:
            raise ValueError("token_rows without token_labels belong to sequences: such a batch cannot be padded")
        sizes = dict.fromkeys(("input_ids", "token_type_ids", "positions"), shape.num_tokens)
        sizes |= dict.fromkeys(("seq_ids", "nsp_labels", "sop_labels", "labels"), shape.num_sequences)
        sizes |= {"cu_seqlens": shape.num_sequences + 1, "mlm_rows": shape.mlm_rows, "mlm_labels": shape.mlm_rows}
        sizes |= {"token_rows": shape.token_rows, "token_labels": shape.token_rows}
        if self.token_rows is None:
            sizes["token_labels"] = shape.num_tokens
        kept = {}
        for name, values in self.tensors().items():
            fill = IGNORE if name.endswith("labels") else sum(self.lengths) if name == "cu_seqlens" else 0
            kept[name] = values.new_full((sizes[name], *values.shape[1:]), fill)
            kept[name][: len(values)] = values
        lengths = (*self.lengths, *[0] * (shape.num_sequences - self.num_sequences))
        return dataclasses.replace(self, **kept, lengths=lengths, longest=shape.max_seqlen)

    def split(self, count: int) -> list["Batch"]:
        """As `count` batches of about as many sequences each, in order, or as many as there are sequences.

        Each sequence keeps its name and its targets; a row to ignore goes where it points.
        """
        if count > 1 and self.labels is not None and len(self.labels) != self.num_sequences:
            raise ValueError("the labels are of groups of sequences: such a batch cannot be split")
        count = max(min(count, self.num_sequences), 1)
        edges = [number * self.num_sequences // count for number in range(count + 1)]
        return [self] if count == 1 else [self._between(*edge) for edge in pairwise(edges)]

    def _between(self, first: int, last: int) -> "Batch":
        """Sequences `first` to `last`, the last excluded."""
        begin, end = sum(self.lengths[:first]), sum(self.lengths[:last])
        kept = {name: getattr(self, name)[begin:end] for name in ("input_ids", "token_type_ids", "positions")}
        for name in ("seq_ids", "nsp_labels", "sop_labels", "labels"):
            if (values := getattr(self, name)) is not None:
                kept[name] = values[first:last]
        for name in ("mlm", "token"):
            rows, labels = (getattr(self, f"{name}_{what}") for what in ("rows", "labels"))
            if rows is not None:
                inside = (rows >= begin) & (rows < end)
                kept |= {
                    f"{name}_rows": rows[inside] - begin,
                    f"{name}_labels": labels if labels is None else labels[inside],
                }
        cu_seqlens = self.cu_seqlens[first : last + 1] - begin
        return dataclasses.replace(self, cu_seqlens=cu_seqlens, lengths=self.lengths[first:last], **kept)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a batch: with `Batch.padded` batches of many sizes have few. Rows are 0 where there are none."""

    num_tokens: int
    num_sequences: int
    max_seqlen: int
    mlm_rows: int = 0
    token_rows: int = 0

    def rounded(self, longest: int) -> "Shape":
        """The next of four shapes an octave; lengths go up to a power of two, or to `longest`, what a model takes.

        A function of the sizes alone: a step has the same shape whatever came before it.
        """
        sizes = {name: _next_size(size) for name, size in vars(self).items()}
        bound = max(SHORTEST, 1 << (self.max_seqlen - 1).bit_length())
        return Shape(**sizes | {"max_seqlen": max(min(bound, longest), self.max_seqlen)})


def _next_size(size: int) -> int:
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def pack(
    sequences: Sequence[Sequence[int]],
    token_type_ids: Sequence[Sequence[int]] | None = None,
    *,
    seq_ids: Sequence[int] | None = None,
    **targets: Tensor,
) -> Batch:
    """Lay sequences of token ids end to end.

    Args:
        sequences: B lists or arrays of ids; an empty one is allowed.
        token_type_ids: the same shape, or None for all zero.
        seq_ids: B integers that name the sequences; 0, 1, 2, … where None.
        targets: mlm_rows, mlm_labels, nsp_labels, sop_labels, labels, token_rows or token_labels, passed through.
    Raises:
        ValueError: token_type_ids or seq_ids do not fit the sequences.
    """
    lengths = tuple(len(sequence) for sequence in sequences)
    seq_ids = range(len(lengths)) if seq_ids is None else seq_ids
    if len(seq_ids) != len(lengths):
        raise ValueError(f"seq_ids names {len(seq_ids)} sequences, got {len(lengths)}")
    ids = _concatenate(sequences)
    if token_type_ids is None:
        types = np.zeros_like(ids)
    else:
        if tuple(len(types) for types in token_type_ids) != lengths:
            raise ValueError("token_type_ids do not have the lengths of the sequences")
        types = _concatenate(token_type_ids)
    positions = _concatenate([np.arange(length) for length in lengths])
    return Batch(
        input_ids=torch.from_numpy(ids),
        token_type_ids=torch.from_numpy(types),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=lengths,
        seq_ids=torch.from_numpy(np.asarray(seq_ids, dtype=np.int64)),
        **targets,
    )


def pack_padded(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Batch, Tensor]:
    """The Hugging Face layout, [B, S] with a 0/1 mask, to a packed batch and the bool mask [B, S] of its tokens.

    Real tokens may lie anywhere in a row (left padding works); each keeps the position it had in the row, as in
    Hugging Face. Reads the mask on the host, once.
    Raises:
        ValueError: a shape differs from input_ids' (position_ids may leave out the batch), or the mask is not of 0
            and 1.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: expected [batch, length]")
    for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(input_ids.shape)}, as input_ids")
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        mask = attention_mask != 0
        if not torch.equal(mask.to(attention_mask.dtype), attention_mask):
            raise ValueError("attention_mask holds other values than 0 and 1")
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
    if position_ids.shape not in {input_ids.shape, (1, *input_ids.shape[1:]), input_ids.shape[1:]}:
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}: expected {list(input_ids.shape)}")
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    lengths = tuple(mask.sum(1).tolist())
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=input_ids.device)
    batch = Batch(
        input_ids=input_ids[mask],
        token_type_ids=token_type_ids[mask],
        positions=position_ids.expand_as(input_ids)[mask],
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        seq_ids=torch.arange(len(lengths), device=input_ids.device),
    )
    return batch, mask


def unpack(x: Tensor, mask: Tensor) -> Tensor:
    """Packed [T, ...] back to [B, S, ...] where the mask is true, zero at padding."""
    padded = x.new_zeros(*mask.shape, *x.shape[1:])
    padded[mask] = x
    return padded


def _concatenate(arrays) -> np.ndarray:
    return np.concatenate([np.asarray(a, dtype=np.int64) for a in arrays] or [np.zeros(0, dtype=np.int64)])
