"""Counter-based random bits: Philox-4x32, 7 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3")

A draw is a pure function of (seed, counter): nothing is stored, and a backward pass draws its dropout mask again.
`philox` is written with `* ^ & >>` alone, so that one definition serves Python integers, NumPy int64 arrays and torch
int64 tensors: it is at once the oracle of the tests and the draw of the reference path. `philox_tile` is the same
function on a GPU.

Dropout keeps an element where its byte is at least `threshold(p)`, so that one call (4 x 32 bits) serves 16
neighbouring columns; survivors are scaled by the exact kept fraction, which makes the expectation right.
"""

import torch

from ._triton import tl, triton

ROUNDS = 7
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
MUL_A, MUL_B = 0xD2511F53, 0xCD9E8D57
WORD = 0xFFFFFFFF
HEAD_SHIFT = 22  # attention's first counter is head << 22 | column group: 1,024 heads, 67 M columns


@triton.jit
def philox_tile(seed, c0, c1, c2, c3):
    """`philox` on tiles: seed int64 scalar, uint32 counters that broadcast to one shape; four uint32 tiles."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        a0, b2 = c0, c2
        c0 = tl.umulhi(b2, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(a0, 0xD2511F53) ^ c3 ^ k1
        c1 = b2 * 0xCD9E8D57
        c3 = a0 * 0xD2511F53
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def bytes_at_least(words, threshold):
    """Four comparisons at once: bit 7 of each byte of uint32 words says whether the byte is at least the threshold, 1
    to 255; the other bits are 0."""
    # byte + (256 - threshold) overflows: what bit 7 carries is the majority of its two summands and of what comes in
    low = (words & 0x7F7F7F7F) + ((256 - threshold) % 128 * 0x01010101).to(tl.uint32)
    high = ((threshold - 129) >> 31).to(tl.uint32)  # all ones where that is negative
    return ((words & low) | (high & (words | low))) & 0x80808080


@triton.jit
def row_keep_tile(seed, threshold, rows, M: tl.constexpr, N: tl.constexpr):
    """`row_keep` on a tile: bool [M, N] for int64 row counters [M] and columns 0 .. N-1, N a multiple of 16."""
    group = tl.arange(0, N // 16).to(tl.uint32)[None, :]
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox_tile(seed, group, tl.zeros_like(group), low, high)
    # selecting the word by column keeps every bit in the thread that drew it: no exchange through shared memory
    byte = tl.arange(0, 16)[None, None, :]
    first = tl.where(byte < 4, w0[:, :, None], w1[:, :, None])
    second = tl.where(byte < 12, w2[:, :, None], w3[:, :, None])
    word = tl.where(byte < 8, first, second)
    # a byte is compared at the top of the word: what is below it decides nothing, and so need not be cut off
    drawn = word << (24 - byte % 4 * 8).to(tl.uint32)
    return (drawn >= (threshold.to(tl.uint32) << 24)).reshape(M, N)


def philox(seed, c0, c1=0, c2=0, c3=0):
    """Four 32-bit words for counters (c0, c1, c2, c3) under a 64-bit seed.

    Args:
        seed, c0, c1, c2, c3: Python ints, or broadcastable int64 NumPy arrays or torch tensors. Counters use their
            low 32 bits, the seed all 64.
    Returns:
        Four integers, arrays or tensors with values in [0, 2**32).
    """
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1, c2, c3 = c0 & WORD, c1 & WORD, c2 & WORD, c3 & WORD
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, so their two halves are right although the sign is not
        a, b = c0 * MUL_A, c2 * MUL_B
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return c0, c1, c2, c3


def fold(seed, *parts):
    """A new 63-bit seed from a seed and counters, e.g. fold(run_seed, step, layer, site); ints, arrays or tensors."""
    for part in parts:
        low, high, _, _ = philox(seed, part, part >> 32, 0x5EED, 0)
        seed = low | ((high & 0x7FFFFFFF) << 32)
    return seed


def uniform(seed, *counters):
    """float64 in [0, 1) with 32 random bits, as NumPy: what data code draws masks and partners with."""
    return philox(seed, *counters)[0] / 2.0**32


def threshold(p: float) -> int:
    """The dropout byte threshold: an element survives where its byte >= threshold(p); p in [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout={p} is not in [0, 1)")
    return min(round(p * 256), 255)


def keep_scale(p: float) -> float:
    """1 / the exact kept fraction that `threshold(p)` gives."""
    return 256.0 / (256 - threshold(p))


def keep_mask(seed, p, c0, c1, c2, c3, cols):
    """Which elements dropout keeps.

    Args:
        seed: int, or int64 scalar tensor.
        c0: first counter of column group 0; group g (columns 16g .. 16g+15) draws with c0 + g.
        c1, c2, c3: int64 tensors broadcastable with c0; their common shape is [...].
        cols: number of columns.
    Returns:
        bool tensor [..., cols].
    """
    groups = torch.arange(-(-cols // 16), device=c0.device)
    words = philox(seed, c0[..., None] + groups, c1[..., None], c2[..., None], c3[..., None])
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [..., groups, 4]
    drawn = words.to(torch.int32).view(torch.uint8)  # the bytes of a word, the lowest first: [..., groups, 16]
    return (drawn >= threshold(p)).flatten(-2)[..., :cols]


def attention_keep(seed, p, seq_ids, num_heads, rows, cols):
    """Attention's dropout mask: bool [B, H, rows, cols] from (seed, seq_ids [B], head, row, column)."""
    device = seq_ids.device
    head = torch.arange(num_heads, device=device)[None, :, None] << HEAD_SHIFT
    row = torch.arange(rows, device=device)[None, None, :]
    seq = seq_ids[:, None, None]
    return keep_mask(seed, p, *torch.broadcast_tensors(head, row, seq, seq >> 32), cols)


def row_keep(seed, p, rows, cols):
    """Row dropout's mask: bool [T, cols] from (seed, rows [T], column); the twin of `row_keep_tile`."""
    zero = torch.zeros_like(rows)
    return keep_mask(seed, p, zero, zero, rows, rows >> 32, cols)


def as_counters(rows, num_rows, device):
    """`row_keep`'s int64 [num_rows] counters: the caller's, whatever their shape, or 0, 1, 2, ..."""
    if rows is None:
        return torch.arange(num_rows, device=device)
    return (rows if rows.ndim == 1 else rows.reshape(-1)).contiguous()


def as_seed(seed, device):
    """`seed` as an int64 scalar on `device`: a kernel reads it there, so a captured graph may be given a new one."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}: expected an int or one int64 on {device}"
            )
        return seed
    # full() takes the 64 bits as a signed number
    return torch.full((), seed if -(2**63) <= seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)
