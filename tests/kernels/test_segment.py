import random
from dataclasses import dataclass

import pytest
import torch
from harness import DTYPES, LAYOUTS, arrange, check, repeat_with

from minibert_kernels import dispatch, segment
from minibert_kernels.segment import ROWS, STEP, segment_sum, segment_sums
from minibert_kernels.traffic import counted


def torch_sum(x, keys, size, dtype=None):
    """The op as one writes it in torch, for keys in [0, size) and others."""
    wanted = (keys >= 0) & (keys < size)
    out = x.new_zeros(size, x.shape[1], dtype=dtype)
    return out.index_add_(0, keys[wanted], x[wanted].to(out.dtype))


@dataclass(frozen=True)
class Case:
    seed: int
    rows: int
    cols: int
    size: int
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    keys: str = "any"

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        edge = ROWS * rng.randint(1, 3)
        return cls(
            seed=seed,
            rows=rng.choice([0, 1, 13, edge - 1, edge, edge + 1, rng.randint(1, 300)]),
            cols=rng.choice([1, 7, 37, 64, 65, 130, rng.randint(1, 200)]),
            size=rng.choice([1, 2, 3, 7, 40, 1000, rng.randint(1, 300)]),
            dtype=rng.choice(DTYPES),
            out_dtype=rng.choice([None, None, torch.float32]),
            layout=rng.choice(LAYOUTS),
            keys=rng.choice(["any", "outside too", "one", "sorted"]),
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        low, high = (-2, self.size + 3) if self.keys == "outside too" else (0, self.size)
        keys = torch.randint(low, high, (self.rows,), generator=generator).to(device)
        if self.keys == "one":
            keys = torch.full_like(keys, self.size - 1)
        elif self.keys == "sorted":
            keys = keys.sort().values

        def draw():
            x = torch.randn(self.rows, self.cols, generator=generator).to(device, self.dtype)
            return {"x": arrange(x, self.layout if self.rows else "contiguous")}, []

        with repeat_with(self, device):
            check(
                lambda x: segment_sum(x.detach(), keys, self.size, self.out_dtype),
                lambda x: torch_sum(x.detach(), keys, self.size, self.out_dtype),
                lambda x: torch_sum(x.detach(), keys, self.size),
                draw,
                draws=1 if self.size * self.cols >= 256 else 4,
            )


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize("size", [1, 2, 512])
def test_runs_over_more_chunks_than_are_added_at_a_time(size, device, poisoned):
    Case(seed=size, rows=ROWS * (2 * STEP + 3) + 5, cols=3, size=size).run(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 512, 30522])
def test_the_tables_of_bert(size, dtype):
    Case(seed=size, rows=16384, cols=768, size=size, dtype=dtype, out_dtype=torch.float32).run("cuda")


def test_a_lost_part_of_a_run_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    class Idle:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    monkeypatch.setattr(segment, "_crossing_runs_kernel", Idle())
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, rows=2 * ROWS, cols=7, size=1).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


def test_every_arrangement_of_a_run_around_the_borders_of_chunks(device, poisoned):
    # counts of rows of key 0, 1 and 2, so that runs begin, end and fill chunks in every way
    counts = [0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS]
    for a in counts:
        for b in counts:
            keys = torch.tensor([0] * a + [1] * b + [2], device=device).flip(0)
            x = torch.ones(len(keys), 1, device=device)
            assert segment_sum(x, keys, 4).flatten().tolist() == [a, b, 1, 0]


def test_sums_are_taken_in_float32(device):
    x = torch.full((5000, 1), 0.5, device=device, dtype=torch.float16)
    keys = torch.zeros(5000, dtype=torch.int64, device=device)
    assert segment_sum(x, keys, 1).item() == 2500.0, "in float16 the sum would stay at 1024"


def test_values_that_are_not_finite_stay_with_their_key(device):
    x = torch.tensor([[1.0], [float("inf")], [float("nan")], [2.0], [float("-inf")], [float("inf")]], device=device)
    keys = torch.tensor([0, 1, 2, 0, 3, -1], device=device)
    out = segment_sum(x, keys, 5).flatten().tolist()
    assert out[:2] == [3.0, float("inf")] and out[2] != out[2] and out[3:] == [float("-inf"), 0.0]


def test_the_order_of_rows_within_a_key_is_kept(device):
    x = torch.randn(3 * ROWS + 5, 7, device=device)
    keys = torch.arange(len(x), device=device) % 3
    shuffled = torch.argsort(keys, stable=True)
    assert torch.equal(segment_sum(x, keys, 3), segment_sum(x[shuffled], keys[shuffled], 3))


@pytest.mark.parametrize("sizes", [(40, 7), (40, 7, 2), (1 << 15, 7, 2), (1, 1, 1), (40, 0, 2)])
def test_several_tables_are_summed_with_one_sort(sizes, device, monkeypatch, poisoned):
    x = torch.randn(3 * ROWS + 5, 37, device=device)
    generator = torch.Generator().manual_seed(0)
    # some before the table, and some where another table has its keys
    keys = [torch.randint(-2, size + 3, (len(x),), generator=generator).to(device) for size in sizes]
    alone = [segment_sum(x, *one) for one in zip(keys, sizes, strict=True)]
    sorts, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, **options: sorts.append(x.dtype) or sort(x, **options))
    together = segment_sums(x, keys, sizes)
    assert sorts == [torch.int16 if sum(sizes) < 2**15 else torch.int32]
    for ours, exact, one in zip(together, alone, zip(keys, sizes, strict=True), strict=True):
        torch.testing.assert_close(ours, exact)
        torch.testing.assert_close(ours, torch_sum(x, *one))


def test_an_empty_table_or_no_rows(device):
    keys = torch.zeros(0, dtype=torch.int64, device=device)
    assert not segment_sum(torch.zeros(0, 7, device=device), keys, 3).any()
    assert segment_sum(torch.zeros(0, 7, device=device), keys, 0).shape == (0, 7)


@pytest.mark.skipif(not dispatch.interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("size", [2, 64, 1 << 14, 1 << 16])
def test_each_row_is_read_once_and_each_sum_written_once(size):
    rows, cols = 512, 128
    x = torch.randn(rows, cols)
    keys = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(0))
    with counted() as traffic:
        segment_sum(x, keys, size)
    written = len(keys.unique()) * cols * 4
    prepared, first, second = traffic.launches
    assert prepared <= 1.05 * 12 * rows
    assert first <= 1.05 * (x.nbytes + 16 * rows + written)
    assert second <= 1.1 * (x.nbytes / 32 + written)
