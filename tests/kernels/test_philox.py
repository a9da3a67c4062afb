import numpy as np
import pytest
import torch

from minibert_kernels import philox
from minibert_kernels._triton import tl, triton
from minibert_kernels.philox import attention_keep, fold, keep_scale, row_keep, threshold, uniform

# the seven-round rows of kat_vectors in the authors' Random123: counter, key, result
ONES = (0xFFFFFFFF,) * 4
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (ONES, 0xFFFFFFFF_FFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (PI, 0x299F31D0_A4093822, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


@triton.jit
def _philox_kernel(seed_ptr, counter_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    c0 = tl.load(counter_ptr + index).to(tl.uint32)
    c1 = tl.load(counter_ptr + N + index).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * N + index).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * N + index).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox_tile(tl.load(seed_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + index, w0.to(tl.int64))
    tl.store(out_ptr + N + index, w1.to(tl.int64))
    tl.store(out_ptr + 2 * N + index, w2.to(tl.int64))
    tl.store(out_ptr + 3 * N + index, w3.to(tl.int64))


@triton.jit
def _row_keep_kernel(seed_ptr, rows_ptr, out_ptr, threshold, M: tl.constexpr, N: tl.constexpr):
    rows = tl.load(rows_ptr + tl.arange(0, M))
    keep = philox.row_keep_tile(tl.load(seed_ptr), threshold, rows, M, N)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_seven_rounds_give_the_authors_known_answers(counter, key, expected):
    assert philox.philox(key, *counter) == expected


def test_int_numpy_torch_and_triton_draw_the_same_bits(device):
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (4, 64))
    counters[:, :3] = [0, 2**31, 2**32 - 1]
    for seed in (0, 1, -1, 2**31, 0x0123_4567_89AB_CDEF, -(2**63)):
        expected = [philox.philox(seed, *(int(c) for c in column)) for column in counters.T]
        by_numpy = philox.philox(seed, *counters)
        by_torch = philox.philox(torch.tensor(seed), *torch.from_numpy(counters))
        out = torch.zeros(4, 64, dtype=torch.int64, device=device)
        arguments = torch.tensor(seed, device=device), torch.from_numpy(counters).to(device), out
        _philox_kernel[(1,)](*arguments, N=64)
        for words in (by_numpy, by_torch, out.cpu()):
            assert np.array_equal(np.stack([np.asarray(w) for w in words], 1), expected)


def test_counters_use_their_low_and_seeds_all_their_bits():
    assert philox.philox(5, 2**32 + 3) == philox.philox(5, 3)
    assert philox.philox(5 + 2**32, 3) != philox.philox(5, 3)
    assert philox.philox(5 + 2**64, 3) == philox.philox(5, 3)


@pytest.mark.parametrize("cols", [1, 16, 37, 128])
def test_the_row_mask_is_one_byte_an_element_of_the_draw_of_its_row_and_column_group(cols, device):
    rows = torch.tensor([0, 13, 2**32 + 13, -1])
    keep = row_keep(99, 0.3, rows, cols)
    for t, row in enumerate(rows.tolist()):
        for col in range(cols):
            word = philox.philox(99, col // 16, 0, row, row >> 32)[col % 16 // 4]
            assert keep[t, col] == (word >> 8 * (col % 4) & 0xFF >= threshold(0.3))
    padded = max(16, 1 << (cols - 1).bit_length())
    tile = torch.zeros(4, padded, dtype=torch.int32, device=device)
    seed = torch.tensor(99, device=device)
    _row_keep_kernel[(1,)](seed, rows.to(device), tile, threshold(0.3), M=4, N=padded)
    assert torch.equal(tile[:, :cols].cpu() == 1, keep)


def test_the_attention_mask_is_keyed_on_sequence_head_row_and_column():
    ids = torch.tensor([7, 2**40 + 7])
    keep = attention_keep(5, 0.5, ids, 3, 7, 37)
    assert keep.shape == (2, 3, 7, 37)
    for b, h, row, col in ((0, 0, 0, 0), (0, 2, 6, 36), (1, 1, 3, 16), (1, 2, 5, 31)):
        seq = int(ids[b])
        word = philox.philox(5, (h << philox.HEAD_SHIFT) + col // 16, row, seq, seq >> 32)[col % 16 // 4]
        assert keep[b, h, row, col] == (word >> 8 * (col % 4) & 0xFF >= 128)
    assert torch.equal(attention_keep(5, 0.5, ids.flip(0), 3, 7, 37), keep.flip(0)), "a mask moves with its sequence"
    assert torch.equal(attention_keep(5, 0.5, ids, 3, 5, 20), keep[:, :, :5, :20]), "a mask does not depend on padding"


def test_the_kept_fraction_is_the_exact_one():
    for p in (0.0, 0.1, 0.5, 0.9):
        keep = row_keep(3, p, torch.arange(2000), 256).double()
        assert keep.mean().item() * keep_scale(p) == pytest.approx(1, abs=0.01)
    assert row_keep(3, 0.0, torch.arange(13), 37).all()


@pytest.mark.parametrize(
    "other",
    [
        lambda keep: row_keep(4, 0.5, torch.arange(1024), 1024),
        lambda keep: row_keep(3 + 2**32, 0.5, torch.arange(1024), 1024),
        lambda keep: row_keep(3, 0.5, torch.arange(1024) + 2**32, 1024),
        lambda keep: keep.roll(1, 0),
        lambda keep: keep.roll(1, 1),
        lambda keep: keep.roll(4, 1),
        lambda keep: keep.roll(16, 1),
        lambda keep: keep.T,
    ],
    ids=["seed", "high seed", "high row", "next row", "next column", "next word", "next group", "transposed"],
)
def test_masks_of_other_counters_are_independent(other):
    keep = row_keep(3, 0.5, torch.arange(1024), 1024)
    # a million pairs: the standard deviation of the agreement is 0.0005
    assert (keep == other(keep)).float().mean().item() == pytest.approx(0.5, abs=0.003)


def test_bytes_and_uniforms_are_evenly_distributed():
    words = np.stack(philox.philox(11, np.arange(2**14)))
    counts = np.bincount((words[..., None] >> np.arange(0, 32, 8) & 0xFF).ravel(), minlength=256)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 150 < chi2 < 380  # 255 degrees of freedom
    draws = uniform(11, np.arange(2**14))
    assert draws.min() >= 0 and draws.max() < 1
    assert np.histogram(draws, 16, (0, 1))[0] == pytest.approx(1024, abs=150)


def test_fold_gives_a_seed_of_its_own_to_every_step_layer_and_site():
    seeds = {
        fold(run, step, layer, site)
        for run in range(4)
        for step in range(20)
        for layer in range(6)
        for site in range(4)
    }
    assert len(seeds) == 4 * 20 * 6 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert fold(7, 1, 2) != fold(7, 2, 1)
    assert fold(7, 1) != fold(7, 1 + 2**32)
    assert fold(7) == 7
    assert fold(torch.tensor(7), 5, 3).item() == fold(7, 5, 3) == int(fold(7, np.array([5]), 3)[0])


def test_threshold_and_scale_agree_and_refuse_what_is_no_probability():
    assert [threshold(p) for p in (0.0, 0.1, 0.5, 0.999)] == [0, 26, 128, 255]
    assert keep_scale(0.0) == 1.0 and keep_scale(0.5) == 2.0
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout=.* is not in \[0, 1\)"):
            threshold(p)


def test_a_seed_becomes_one_signed_64_bit_number_on_the_device():
    cpu = torch.device("cpu")
    assert philox.as_seed(5, cpu).item() == 5
    assert philox.as_seed(2**64 - 1, cpu).item() == philox.as_seed(-1, cpu).item() == -1
    mine = torch.tensor(5)
    assert philox.as_seed(mine, cpu) is mine
    for wrong in (torch.tensor(5.0), torch.tensor([1, 2]), torch.zeros((), dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match="expected an int or one int64 on cpu"):
            philox.as_seed(wrong, cpu)
