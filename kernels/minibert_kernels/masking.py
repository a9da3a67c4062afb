"""Which tokens a masked language model must predict, chosen and replaced on the device (Devlin et al., 2019, 3.1).

Every candidate (a token that is not special) has a key, and the tokens of a sequence with the smallest keys are chosen:
those up to the least tau that reaches max(1, rint(rate · candidates)) of them. With the draw of position p being the
first Philox word of counters (p, sequence, epoch), a key is the pair (draw, position) of

    token  the token itself
    word   the first token of its word
    span   the least of all starts whose span reaches it with no special token between (Joshi et al., 2020)

so the last word may exceed the number; the last span is cut there. A chosen token becomes [MASK], a random ordinary
one, or stays: 80, 10, 10 %, token by token, by its second and third word; the fourth is the length of the span that may
start at it.

One program a sequence, with its tokens in registers: tau is found bit by bit, by counting keys below it, so nothing is
sorted. Bytes: ids are read, masked ids and labels written, 24 a token. Nothing is differentiable, nothing is saved.
"""

import torch

from . import reference
from ._triton import tl, triton
from .dispatch import check_device, check_sequences, use_triton
from .jit import kernel
from .launch import AotCase, aot_arguments, masking_plan, on_device
from .op import Op
from .philox import as_seed, philox_tile
from .reference import UNITS, SequenceLayout, exact_labels, span_reach

MAX_LENGTH = 4096
MAX_SPAN = 32


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _counters(seed_ptr, seq_ids_ptr, epochs_ptr):
    """What the draws of this program's sequence have in common: folded seed, sequence id (low, high), epoch."""
    seq, zero = tl.program_id(0), tl.full((), 0, tl.uint32)
    seq_id, epoch = seq.to(tl.int64), zero
    if seq_ids_ptr is not None:
        seq_id = tl.load(seq_ids_ptr + seq)
    if epochs_ptr is not None:
        epoch = (tl.load(epochs_ptr + seq) & 0xFFFFFFFF).to(tl.uint32)
    # philox.fold(seed, reference.MLM_SITE)
    low, high, _, _ = philox_tile(tl.load(seed_ptr), zero + 0x3A5C, zero, zero + 0x5EED, zero)
    seed = low.to(tl.int64) | ((high & 0x7FFFFFFF).to(tl.int64) << 32)
    return seed, (seq_id & 0xFFFFFFFF).to(tl.uint32), ((seq_id >> 32) & 0xFFFFFFFF).to(tl.uint32), epoch


@triton.jit
def _last_needed(key, wanted, BITS: tl.constexpr):
    """The `wanted`-th smallest key, of those below 2**BITS; 0 where none is wanted."""
    tau = tl.full((), 0, tl.int64)
    bit = tl.full((), 1, tl.int64) << (BITS - 1)
    for _ in range(BITS):
        below = tl.sum((key < (tau | bit)).to(tl.int32), 0)
        tau = tl.where(below < wanted, tau | bit, tau)
        bit = bit >> 1
    return tau


@kernel(varying=("n_tokens",))
def _mlm_mask_kernel(
    ids_ptr, cu_seqlens_ptr, seq_ids_ptr, epochs_ptr, seed_ptr,  # int64 [T], int32 [B + 1], [B] or None twice, scalar
    special_ptr, continues_ptr, ordinary_ptr,  # bool [V], bool [V] or None, int64 [n]
    masked_ptr, labels_ptr,  # int64 [T] twice; without choosing: what each token would become, and its key
    stride_ids, n_tokens, n_ordinary, mask_id,
    RATE: tl.constexpr, REACH: tl.constexpr, CHOOSE: tl.constexpr, LOG_BLOCK: tl.constexpr,
):  # fmt: skip
    first_token = tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - first_token
    position = tl.arange(0, 1 << LOG_BLOCK)
    in_seq = position < length
    token = first_token + position
    ids = tl.load(ids_ptr + token * stride_ids, mask=in_seq, other=0).to(tl.int32)  # half the registers
    candidate = in_seq & (tl.load(special_ptr + ids, mask=in_seq, other=1) == 0)

    first, base = position, position
    if continues_ptr is not None or len(REACH) > 1:
        # where the run of candidates, or the word, of each token begins
        first = tl.where(candidate, 0, position + 1)
        if continues_ptr is not None:
            begins = candidate & (tl.load(continues_ptr + ids, mask=in_seq, other=0) == 0)
            first = tl.where(begins, position, first)
        first = tl.associative_scan(first, 0, _larger)
        base = position if continues_ptr is None else first
    seed, low, high, epoch = _counters(seed_ptr, seq_ids_ptr, epochs_ptr)
    key = tl.full([1 << LOG_BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)  # reference.NEVER
    for distance in tl.static_range(len(REACH)):
        start = base - distance
        # drawn again: cheaper than to move draws between threads
        draw, _, _, stretch = philox_tile(seed, start.to(tl.uint32), low, high, epoch)
        reached = candidate & (start >= first) & (stretch.to(tl.int64) >= REACH[distance])
        key = tl.where(reached, tl.minimum(key, (draw.to(tl.int64) << LOG_BLOCK) | start), key)

    chosen, label = candidate, key
    if CHOOSE:
        count = tl.sum(candidate.to(tl.int32), 0)
        # adding and taking away 2**52 rounds to the nearest integer, ties to even
        wanted = (count.to(tl.float64) * RATE + 4503599627370496.0) - 4503599627370496.0
        wanted = tl.minimum(tl.maximum(wanted.to(tl.int32), 1), count)
        last = _last_needed(key, wanted, 32 + LOG_BLOCK)
        if len(REACH) > 1:  # of the last span, the tokens that come first
            key = tl.where(key < last, 0, tl.where(key == last, position + 1, 2 << LOG_BLOCK))
            last = _last_needed(key, wanted, LOG_BLOCK + 1)
        chosen = key <= last
        label = tl.where(chosen, ids, -100)
    tl.store(labels_ptr + token, label, mask=in_seq)

    _, action, choice, _ = philox_tile(seed, position.to(tl.uint32), low, high, epoch)
    drawn = tl.load(ordinary_ptr + ((choice.to(tl.int64) * n_ordinary) >> 32), mask=chosen, other=0)
    # reference.MLM_MASKED and MLM_RANDOM
    becomes = tl.where(action < 3435973837, mask_id, tl.where(action < 3865470566, drawn, ids))
    tl.store(masked_ptr + token, tl.where(chosen, becomes, ids), mask=in_seq)

    # tokens before the first sequence and after the last stay as they are
    begin = tl.load(cu_seqlens_ptr).to(tl.int64)
    inside = tl.load(cu_seqlens_ptr + tl.num_programs(0)) - begin
    for start in range(tl.program_id(0) << LOG_BLOCK, n_tokens - inside, tl.num_programs(0) << LOG_BLOCK):
        token = start + position
        outside = token < n_tokens - inside
        token = tl.where(token < begin, token, token + inside)
        as_it_was = tl.load(ids_ptr + token * stride_ids, mask=outside, other=0)
        tl.store(masked_ptr + token, as_it_was, mask=outside)
        tl.store(labels_ptr + token, tl.full([1 << LOG_BLOCK], -100, tl.int64), mask=outside)


def _run_forward(
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_ids: torch.Tensor | None,
    epochs: torch.Tensor | None,
    seed: torch.Tensor,
    special: torch.Tensor,
    continues: torch.Tensor | None,
    ordinary: torch.Tensor,
    max_seqlen: int,
    mask_id: int,
    rate: float,
    reach: list[int],
    choose: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    masked, labels = ids.new_empty(ids.shape), ids.new_empty(ids.shape)
    if len(ids) == 0:
        return masked, labels
    if len(cu_seqlens) == 1:
        return masked.copy_(ids), labels.fill_(-100)
    plan = masking_plan(max_seqlen, len(reach))
    counters = (None if t is None else t.contiguous() for t in (seq_ids, epochs))
    tables = (None if t is None else t.contiguous() for t in (special, continues, ordinary))
    with on_device(ids):
        # without fusion: rate * count is rounded before its rounding to an integer, as NumPy does
        _mlm_mask_kernel[(len(cu_seqlens) - 1,)](
            ids, cu_seqlens.contiguous(), *counters, seed, *tables, masked, labels,
            ids.stride(0), len(ids), len(ordinary), mask_id,
            RATE=rate, REACH=tuple(reach), CHOOSE=choose, LOG_BLOCK=plan.log_block,
            num_warps=plan.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return masked, labels


_forward = Op("mlm_mask_fwd", _run_forward, lambda ids, *_: (ids.new_empty(ids.shape), ids.new_empty(ids.shape)))


def mlm_mask(
    ids, cu_seqlens, max_seqlen, *, mask_id, special, ordinary, rate=0.15, unit="token", continues=None, max_span=10,
    seed=0, seq_ids=None, epochs=None, num_labels=None, backend="auto",
):  # fmt: skip
    """Choose the tokens to predict, and replace 80 % of them by [MASK] and 10 % by a random token.

    A pure function of (seed, epoch, sequence id, position): the same sequence gets the same masks in whatever batch it
    sits. A sequence with any token that is not special is never left without a label.

    Args:
        ids: [T] int64, values in 0 .. V-1. Those outside of the sequences stay as they are, without a label.
        cu_seqlens: [B + 1] int32, where each sequence begins. max_seqlen: the longest length, or more.
        mask_id: the id of [MASK].
        special: bool [V], ids that are never chosen.
        ordinary: [n] int64, the ids that a random token is drawn from.
        rate: share of the tokens of a sequence that are chosen, special tokens aside; at least one is.
        unit: "token", "word" (the pieces of a word together, so that the last may exceed the share) or "span"
            (geometric lengths, p = 0.2, the last one cut).
        continues: bool [V], with words: the pieces that continue one.
        max_span: the longest span, in tokens.
        seed: int, or one int64 on the device of ids.
        seq_ids, epochs: [B] int64, by default 0, 1, 2, ... and 0.
        num_labels: choose so many tokens of the whole batch, instead of a share of each sequence: first one of every
            sequence, then those that come first in theirs, relative to its length. The last word or span may be cut.
        backend: "auto", "triton" or "reference".
    Returns:
        (masked ids [T], labels [T]), labels -100 where nothing is predicted. With num_labels=K: (masked ids [T], rows
        [K] ascending, labels [K]); if there are fewer candidates, the surplus is row 0 with label -100.
    Raises:
        ValueError: names the argument that does not fit the others.
    """
    _check(ids, cu_seqlens, special, ordinary, rate, unit, continues, max_span, seed, seq_ids, epochs, num_labels)
    check_sequences(cu_seqlens, len(ids), max_seqlen)
    unsupported = None
    if max_seqlen > MAX_LENGTH:
        unsupported = f"takes sequences of up to {MAX_LENGTH} tokens, got {max_seqlen}"
    elif unit == "span" and max_span > MAX_SPAN:
        unsupported = f"takes spans of up to {MAX_SPAN} tokens, got {max_span}"
    if not use_triton("mlm_mask", backend, ids, unsupported=unsupported):
        return reference.mlm_mask(
            ids, cu_seqlens, max_seqlen, mask_id=mask_id, special=special, ordinary=ordinary, rate=rate, unit=unit,
            continues=continues, max_span=max_span, seed=seed, seq_ids=seq_ids, epochs=epochs, num_labels=num_labels,
        )  # fmt: skip
    masked, labels = _forward(
        ids, cu_seqlens, seq_ids, epochs, as_seed(seed, ids.device), special, continues if unit == "word" else None,
        ordinary, max_seqlen, mask_id, rate, list(span_reach(unit, max_span)), num_labels is None,
    )  # fmt: skip
    if num_labels is None:
        return masked, labels
    return exact_labels(ids, labels, masked, SequenceLayout(cu_seqlens, max(max_seqlen, 1), len(ids)), num_labels)


def _check(ids, cu_seqlens, special, ordinary, rate, unit, continues, max_span, seed, seq_ids, epochs, num_labels):
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}: expected int64 [T]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: expected int32 [B + 1]")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is not in (0, 1]")
    if unit == "word" and continues is None:
        raise ValueError("unit='word' needs continues: bool [V], the pieces that continue a word")
    if max_span < 1:
        raise ValueError(f"max_span={max_span} is not positive")
    if num_labels is not None and num_labels < 0:
        raise ValueError(f"num_labels={num_labels} is negative")
    if special.dtype != torch.bool or special.ndim != 1:
        raise ValueError(f"special is {special.dtype} {list(special.shape)}: expected bool [V]")
    if continues is not None and (continues.dtype != torch.bool or continues.shape != special.shape):
        raise ValueError(
            f"continues is {continues.dtype} {list(continues.shape)}: expected bool {list(special.shape)} like special"
        )
    if ordinary.dtype != torch.int64 or ordinary.ndim != 1 or len(ordinary) == 0:
        raise ValueError(f"ordinary is {ordinary.dtype} {list(ordinary.shape)}: expected int64 [n], n of at least 1")
    for name, counters in (("seq_ids", seq_ids), ("epochs", epochs)):
        if counters is not None and (counters.dtype != torch.int64 or counters.shape != (len(cu_seqlens) - 1,)):
            raise ValueError(
                f"{name} is {counters.dtype} {list(counters.shape)}: expected int64 [{len(cu_seqlens) - 1}]"
            )
    check_device(
        ids=ids, cu_seqlens=cu_seqlens, special=special, ordinary=ordinary, continues=continues, seq_ids=seq_ids,
        epochs=epochs,
    )  # fmt: skip
    if isinstance(seed, torch.Tensor):
        as_seed(seed, ids.device)


def aot_cases(capability):
    """The default plans, as `AotCase`s; they are the same on every architecture."""
    for max_seqlen in (128, MAX_LENGTH):
        for unit in UNITS:
            yield _aot_case(max_seqlen, unit, True)
    yield _aot_case(128, "span", False)


def _aot_case(max_seqlen, unit, choose):
    reach = span_reach(unit, 10)
    plan = masking_plan(max_seqlen, len(reach))
    pointers = ("ids", "seed", "ordinary", "masked", "labels", "seq_ids", "epochs")
    known = {f"{name}_ptr": "*i64" for name in pointers} | {"cu_seqlens_ptr": "*i32", "special_ptr": "*i1"}
    known |= {"continues_ptr": "*i1" if unit == "word" else None}
    known |= {"stride_ids": 1, "n_tokens": 16384, "n_ordinary": 30519, "mask_id": 103}
    flags = {"RATE": 0.15, "REACH": reach, "CHOOSE": choose, "LOG_BLOCK": plan.log_block}
    label = f"{max_seqlen} tokens, {unit}{'' if choose else ', exact K'}"
    arguments = aot_arguments(_mlm_mask_kernel, **known, **flags)
    return AotCase(
        op="mlm_mask", direction="fwd", label=label, fn=_mlm_mask_kernel, **arguments,
        num_warps=plan.num_warps, num_stages=1,
    )  # fmt: skip
