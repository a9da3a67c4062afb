"""A search for better launch plans of attention, which prints the lines to paste into `launch.py`.

It walks from the plan that is there to the fastest of its neighbours, as long as one is faster: half or twice a tile,
other warps. A neighbour that does not fit the chip, or whose result differs, is passed over.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from minibert_kernels import attention, launch

from .measure import alone_on_side_stream, on_device
from .shared_work import RESULT, save, seconds_left

GAIN = 0.98  # a plan has to take less than this share of the time of the one it replaces
TILES = (16, 32, 64, 128)
LENGTH, HEAD_SIZES = 512, (64, 128)
DIRECTIONS = {"fwd": "fwd", "dq": "bwd", "dkdv": "bwd"}  # of a plan: the call that runs it


def inputs(dry: bool, head_size: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q, k and v in one tensor, [T, 3, H, d], and the borders of sequences of one length."""
    device, count, heads = ("cpu", 2, 1) if dry else ("cuda", 16384 // length, 768 // head_size)
    torch.manual_seed(0)
    qkv = torch.randn(count * length, 3, heads, head_size, device=device)
    cuts = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
    return qkv.to(dtype), cuts


def calls(qkv: Tensor, cuts: Tensor, length: int) -> dict[str, Callable[[], Tensor]]:
    """Forward, and backward alone, as functions that return what to compare."""
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.unbind(1)
    out = attention(q, k, v, cuts, length, dropout=0.1, seed=1, backend="triton")
    gradient = torch.randn_like(out)
    return {
        "fwd": lambda: attention(*qkv.unbind(1), cuts, length, dropout=0.1, seed=1, backend="triton"),
        "bwd": lambda: torch.autograd.grad(out, leaf, gradient, retain_graph=True)[0],
    }


def neighbours(tiles: tuple) -> Iterator[tuple]:
    block_m, block_n, warps = tiles
    for factor in (0.5, 2):
        if block_m * factor in TILES:
            yield int(block_m * factor), block_n, warps
        if block_n * factor in TILES:
            yield block_m, int(block_n * factor), warps
    yield block_m, block_n, 12 - warps


def first_ring() -> Iterator[tuple[tuple, int, tuple]]:
    """The plans that a search on this chip tries first: keys of launch.ATTENTION_TILES, head sizes, tiles."""
    chip = launch._attention_chip(2, launch.capability(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    for wide in (0, 1):
        for direction in DIRECTIONS:
            base = launch.ATTENTION_TILES[chip, direction][wide]
            yield from (((chip, direction), wide, tiles) for tiles in (base, *neighbours(base)))


def take(key: tuple, wide: int, tiles: tuple) -> None:
    """Make `tiles` the plan; what is kept of plans that were looked up before is forgotten."""
    pair = launch.ATTENTION_TILES[key]
    launch.ATTENTION_TILES[key] = tuple(tiles if i == wide else other for i, other in enumerate(pair))
    for name, module in list(sys.modules.items()):
        if name.startswith("minibert_kernels"):
            for function in vars(module).values():
                getattr(function, "cache_clear", lambda: None)()


def warm(key: tuple, wide: int, tiles: tuple) -> None:
    """The calls of a search with one plan, for their compilations."""
    before = launch.ATTENTION_TILES[key][wide]
    take(key, wide, tiles)
    try:
        made = calls(*inputs(not torch.cuda.is_available(), HEAD_SIZES[wide], LENGTH, torch.bfloat16), LENGTH)
        made[DIRECTIONS[key[1]]]()
    finally:
        take(key, wide, before)


def timed(call: Callable[[], Tensor], rounds: int) -> float:
    sample = on_device(call).sample
    return statistics.median(sample().seconds for _ in range(rounds))


def walk(key: tuple, wide: int, call: Callable[[], Tensor], rounds: int, end: float) -> tuple[tuple, float, float]:
    """The best tiles found for launch.ATTENTION_TILES[key][wide], seconds before, seconds with them."""

    def tried(tiles):
        take(key, wide, tiles)
        result = call()
        if not torch.allclose(result.float(), truth, rtol=0, atol=0.02 * float(truth.abs().max())):
            raise ArithmeticError(f"{key} {tiles}: another result")
        return timed(call, rounds)

    truth = call().float()
    best, before = launch.ATTENTION_TILES[key][wide], timed(call, rounds)
    fastest, seen, better = before, {best}, True
    while better:
        better = False
        for tiles in list(neighbours(best)):
            if tiles in seen or time.perf_counter() > end:
                continue
            seen.add(tiles)
            try:
                taken = tried(tiles)
            except Exception as error:  # too much shared memory, a compiler that gives up, another result
                print(f"{key} {tiles}: {' '.join(str(error).split())[:120]}")
                continue
            if taken < GAIN * fastest:
                best, fastest, better = tiles, taken, True
    take(key, wide, best)
    return best, before, fastest


def search(folder: Path, dry: bool) -> dict:
    """Walk from every plan of this chip, for heads of 64 and of 128, in the time that STAGE_SECONDS leaves.

    After each plan what was found so far is written to `folder`.
    """
    start, budget = time.perf_counter(), seconds_left(5)
    rounds, length, dtype = (1, 32, torch.float32) if dry else (3, LENGTH, torch.bfloat16)
    name = "interpreter" if dry else torch.cuda.get_device_name()
    found, rows = {}, []
    for number, (wide, direction) in enumerate((w, d) for w in (0, 1) for d in DIRECTIONS):
        size = 16 if dry else HEAD_SIZES[wide]
        if dry and number:
            break
        qkv, cuts = inputs(dry, size, length, dtype)
        chip = launch._attention_chip(qkv.element_size(), launch.capability(qkv.device))
        end = start + budget * (number + 1) / 6
        with nullcontext() if dry else alone_on_side_stream():
            call = calls(qkv, cuts, length)[DIRECTIONS[direction]]
        tiles, before, after = walk((chip, direction), wide, call, rounds, end)
        found[chip, direction] = launch.ATTENTION_TILES[chip, direction]
        rows.append({"chip": chip, "direction": direction, "head_size": size, "tiles": tiles, "seconds_before": before,
                     "seconds": after})  # fmt: skip
        lines = [f"# {name}, {date.today()}, S = {length}: paste into ATTENTION_TILES"]
        lines += [f"    {key!r}: {pair!r},".replace("'", '"') for key, pair in found.items()]
        lines += [f"# {r['direction']} d={r['head_size']}: {1e6 * r['seconds_before']:.1f} to "
                  f"{1e6 * r['seconds']:.1f} µs" for r in rows]  # fmt: skip
        save(folder / RESULT, {"plans": rows, "lines": lines})
    return {"plans": rows, "lines": lines}
