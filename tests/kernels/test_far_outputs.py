"""Outputs of more than 2**31 elements: an op is called with so many rows, of which the interpreter runs the first and
the last. All rows are the same row of the input, expanded (for attention, the same sequence and head), so the last row
of a result must hold the bits of the first; memory in between is never touched. An offset in int32 wraps around: the
guard refuses the access by name.

Two ops cannot get there: the logits of linear_cross_entropy come in chunks of 64 MiB, and the tokens of mlm_mask are
counted in int32 by `cu_seqlens`.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from harness import SEED, values_and_gradients
from instruments import few_programs, guarded

import minibert_kernels as kernels
from minibert_kernels import dispatch, segment
from minibert_kernels.attention_tile import FILLERS

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="skips programs of the interpreter's grid")

FAR = 2**31
COLS = 4096
ROWS = FAR // COLS + 7


def rows(cols=COLS, count=None, seed=0):
    """[count, cols] of one row, which takes no memory; more than 2**31 elements by default."""
    row = torch.randn(1, cols, generator=torch.Generator().manual_seed(seed)).half()
    return row.expand(count or FAR // cols + 7, cols)


def vector(cols=COLS, seed=5):
    return torch.randn(cols, generator=torch.Generator().manual_seed(seed))


def same(count):
    return torch.zeros(1, dtype=torch.int64).expand(count)


def attention_call(num_heads, size, max_seqlen, batch, **more):
    """Sequences of 16 tokens, all alike in all their heads."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(16, 1, size, generator=generator).half() for name in "qkv"}
    tokens = {name: t.repeat(batch, 1, 1).expand(-1, num_heads, -1) for name, t in drawn.items()}
    cuts = torch.arange(0, 16 * batch + 1, 16, dtype=torch.int32)
    return kernels.attention, tokens | more | {"cu_seqlens": cuts}, {"max_seqlen": max_seqlen}


def norm_parameters():
    return {"weight": vector(), "bias": vector(seed=6)}


WIDE = 2 * COLS
GROUPS = torch.arange(ROWS) // segment.ROWS  # few rows of a table share a key, else the sum of all would take long
TABLE = rows(count=ROWS // segment.ROWS + 1, seed=2)
CALLS = {
    "dropout_add_norm": lambda: (
        kernels.dropout_add_norm, {"x": rows(), "residual": rows(seed=1), "rows": same(ROWS)} | norm_parameters(),
        {"dropout": 0.1, "seed": SEED, "prenorm": True},
    ),
    "bias_gelu": lambda: (kernels.bias_gelu, {"x": rows(), "bias": vector()}, {}),
    "bias_geglu": lambda: (kernels.bias_geglu, {"x": rows(WIDE, ROWS), "bias": vector(WIDE)}, {}),
    "bias_swiglu": lambda: (kernels.bias_swiglu, {"x": rows(WIDE, ROWS), "bias": vector(WIDE)}, {}),
    "embed_norm": lambda: (
        kernels.embed_norm,
        {"ids": GROUPS, "type_ids": GROUPS, "positions": None, "rows": same(ROWS), "word": TABLE, "position": None,
         "type": TABLE} | norm_parameters(),
        {"dropout": 0.1, "seed": SEED},
    ),
    "select_rows": lambda: (kernels.select_rows, {"x": TABLE, "rows": GROUPS}, {}),
    "pack": lambda: (
        kernels.pack, {"x": rows().view(ROWS, 1, COLS), "mask": torch.ones(ROWS, 1, dtype=torch.bool)},
        {"num_tokens": ROWS},
    ),
    "unpack": lambda: (
        kernels.unpack, {"x": rows(), "cu_seqlens": torch.arange(ROWS + 1, dtype=torch.int32)}, {"max_seqlen": 1}
    ),
    "attention": lambda: attention_call(1024, 128, 16, 1025),
    "attention long": lambda: attention_call(1024, 128, 256, 1025),
    "attention bias": lambda: attention_call(
        64, 16, 128, 2049, score_bias=torch.zeros((), dtype=torch.float16).expand(2049, 64, 128, 128)
    ),
}  # fmt: skip


def test_every_op_that_writes_rows_is_called():
    by_itself = {"lamb_step", "linear_cross_entropy", "mlm_mask"}
    assert {name.split()[0] for name in CALLS} | by_itself == set(kernels.TRITON_OPS)


def run(call):
    """Values, gradients and launches; the gradients that come in are one row, expanded, too."""
    op, tensors, options = call()

    def triton(**given):
        return op(**given, **options, backend="triton")

    # attention's last programs have no tile: they fill rows of no sequence
    with few_programs(ends=4 + FILLERS.value), integers_nobody_wrote(), guarded() as launches:
        with torch.no_grad():
            outs = triton(**tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        douts = [torch.linspace(-1, 1, out.shape[-1]).to(out.dtype).expand(out.shape) for out in outs]
        return values_and_gradients(triton, tensors, douts), launches.seen


@contextmanager
def integers_nobody_wrote():
    """Fill empty integer tensors, so that an index that a skipped program should have written is seen every time."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *size, dtype=None, **options):
        empty = new_empty(self, *size, dtype=dtype, **options)
        return empty if empty.is_floating_point() else empty.random_(-(2**15), 2**15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", filled)
        patch.setattr(segment, "BLOCK", 2**14)  # its few programs all run: the sort reads every key
        yield


# the activations are one kernel
MARKS = dict.fromkeys(("bias_gelu", "bias_swiglu"), [pytest.mark.slow, pytest.mark.product])


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CALLS])
def test_the_last_of_2_31_elements_are_the_bits_of_the_first(name):
    results, launches = run(CALLS[name])
    far = {key: result for key, result in results.items() if result.numel() > FAR}
    assert far, "no result is large enough"
    for key, result in far.items():
        # the last token of a sequence of 16
        start = 15 if name.startswith("attention") and key != "dscore_bias" else 0
        first, last = (result[start, 0], result[-1, -1]) if result.ndim > 2 else (result[0], result[-1])
        assert torch.equal(last, first), key
        assert first.isfinite().all() and first.any(), key
    assert all(max(launch.grid) > 1 for launch in launches)


def test_a_table_of_more_than_2_31_elements_gets_the_sums_of_its_last_rows(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)  # zeros would be written
    size, cols = FAR // 64 + 7, 64
    keys = torch.tensor([0] * 100 + [size - 2] * 3 + [size - 1] * 100)
    x = torch.randn(203, cols, generator=torch.Generator().manual_seed(0))
    with guarded():
        out = segment.segment_sum(x, keys, size)
    for key, part in ((0, x[:100]), (size - 2, x[100:103]), (size - 1, x[103:])):
        torch.testing.assert_close(out[key], part.sum(0))


def test_a_parameter_of_more_than_2_31_elements_is_updated_to_its_end(tmp_path):
    size = FAR + 3 * 16384 + 5
    step = {}
    dtypes = {"params": torch.float16, "grads": torch.float16, "exp_avgs": torch.float32, "exp_avg_sqs": torch.float32}
    for name, dtype in dtypes.items():
        step[name] = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        values = torch.rand(7, generator=torch.Generator().manual_seed(len(step))).to(dtype)
        step[name][:7] = step[name][-7:] = values  # zeros elsewhere, which the file does not hold
    before = step["params"][:7].clone()
    with few_programs(), guarded(*step.values()) as launches:
        kernels.lamb_step(*([t] for t in step.values()), lr=0.1, step=2, adapt=False, backend="triton")
    for name in step.keys() - {"grads"}:
        assert torch.equal(step[name][-7:], step[name][:7]), name
    assert not torch.equal(before, step["params"][:7])
    assert launches.seen[0].grid[0] > 2**17
    for name in step:
        os.truncate(tmp_path / name, 0)
