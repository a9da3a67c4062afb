import random
from dataclasses import dataclass

import pytest
import torch
from harness import DTYPES, LAYOUTS, arrange, check, repeat_with

from minibert_kernels import dispatch, packing, reference
from minibert_kernels.packing import pack, select_rows, unpack
from minibert_kernels.traffic import counted

OPS = {"pack": pack, "unpack": unpack, "select_rows": select_rows}
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)


def draw_lengths(rng):
    longest = rng.choice([0, 1, 7, 13, 40])
    return tuple(rng.choice([0, 1, longest, rng.randint(0, longest)]) for _ in range(rng.choice([0, 1, 2, 5, 13])))


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass(frozen=True)
class Case:
    seed: int
    op: str
    lengths: tuple
    trailing: tuple
    dtype: torch.dtype = torch.float32
    layouts: tuple = ("contiguous",) * 2
    num_tokens: int | None = None
    spare: int = 0  # rows of x after the last sequence, padding after the longest
    picked: int = 5

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        lengths = draw_lengths(rng)
        slots = len(lengths) * max(lengths, default=0)
        return cls(
            seed=seed,
            op=rng.choice(list(OPS)),
            lengths=lengths,
            trailing=rng.choice([(), (1,), (37,), (3, 16), (1025,), (rng.randint(1, 200),)]),
            dtype=rng.choice(DTYPES * 3 + [*WHOLE]),
            layouts=tuple(rng.choice((*LAYOUTS, "tokens first")) for _ in range(2)),
            num_tokens=rng.choice([None, None, sum(lengths), rng.randint(0, slots), slots]),
            spare=rng.choice([0, 0, 3]),
            picked=rng.choice([0, 1, 5, 70, rng.randint(1, 150)]),
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        longest, cuts = max(self.lengths, default=0) + self.spare, borders(self.lengths).to(device)
        tokens = sum(self.lengths) + self.spare
        if self.op == "pack":
            # any slots may be tokens, not only the first of each row
            mask = torch.arange(longest) < torch.tensor(self.lengths).view(-1, 1)
            mask = mask[:, torch.randperm(longest, generator=generator)].to(device)
            shape, others, options = mask.shape, {"mask": mask}, {"num_tokens": self.num_tokens}
            first = mask.sum().item() if self.num_tokens is None else self.num_tokens
        elif self.op == "unpack":
            shape, others, options = (tokens,), {"cu_seqlens": cuts}, {"max_seqlen": longest}
            first = (len(self.lengths), longest)
        else:
            picked = self.picked if tokens else 0
            rows = torch.randint(max(tokens, 1), (picked,), generator=generator).to(device)
            shape, others, options, first = (tokens,), {"rows": rows}, {}, picked

        def normal(shape, layout):
            x = (5 * torch.randn(shape, generator=generator)).to(device, self.dtype)
            if layout == "tokens first":
                return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x
            return arrange(x, layout) if x.numel() and x.is_floating_point() else x

        x = normal((*shape, *self.trailing), self.layouts[0])
        first = first if isinstance(first, tuple) else (first,)
        dout = normal((*first, *self.trailing), self.layouts[1])
        plain = getattr(reference, self.op)
        with repeat_with(self, device):
            if not self.dtype.is_floating_point:
                ours = OPS[self.op](x, **others, **options, backend="triton")
                assert torch.equal(ours, plain(x, **others, **options)) and ours.dtype == self.dtype
                return
            check(
                lambda **tensors: OPS[self.op](**tensors, **options, backend="triton"),
                lambda **tensors: plain(**tensors, **options),
                lambda **tensors: plain(**tensors, **options),
                lambda: ({"x": x, **others}, [dout]),
            )


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("trailing", [(768,), (1024,), (3, 12, 64)])
def test_values_and_gradients_at_the_widths_of_berts(trailing, op, dtype, device, poisoned):
    Case(seed=1, op=op, lengths=(5, 0, 12, 1), trailing=trailing, dtype=dtype, picked=13).run(device)


def test_a_shifted_row_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    monkeypatch.setattr(packing, "_forward", lambda x, index, inverse, forward=packing._forward: forward(
        x, (index + 1) % len(x), inverse
    ))  # fmt: skip
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, op="select_rows", lengths=(13,), trailing=(7,)).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_unpack_is_the_inverse_of_pack(backend, device):
    lengths = (5, 0, 1, 7)
    x = torch.arange(1, 14, device=device)
    padded = unpack(x, borders(lengths).to(device), 8, backend=backend)
    assert padded.tolist() == [
        [1, 2, 3, 4, 5, 0, 0, 0], [0] * 8, [6, 0, 0, 0, 0, 0, 0, 0], [7, 8, 9, 10, 11, 12, 13, 0],
    ]  # fmt: skip
    assert torch.equal(pack(padded, padded > 0, backend=backend), x)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_number_of_tokens_cuts_or_fills_with_zeros(backend, device):
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")]], device=device, requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, False]], device=device)
    for n, values, taken in ((2, [2, 3], [0, 1, 1, 0, 0, 0]), (6, [2, 3, 4, 0, 0, 0], [0, 1, 1, 1, 0, 0])):
        out = pack(x, mask, num_tokens=n, backend=backend)
        assert out.tolist() == values
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert dx.flatten().tolist() == taken


def test_what_is_moved_keeps_its_bits(device):
    bits = torch.tensor([0x7FC00001, -1, 1, 0x7F800000, -(2**31), 0x7FA00000], device=device, dtype=torch.int32)
    rows = torch.tensor([5, 4, 3, 2, 1, 0], device=device)
    moved = select_rows(bits.view(torch.float32), rows, backend="triton").view(torch.int32)
    assert torch.equal(moved, bits.flip(0)), "payloads of NaN, and denormal numbers"


def test_the_gradients_of_a_row_that_is_taken_often_are_added_in_float32(device):
    x = torch.zeros(3, 1, device=device, dtype=torch.float16, requires_grad=True)
    rows = torch.zeros(5000, device=device, dtype=torch.int64)
    out = select_rows(x, rows, backend="triton")
    (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 0.5))
    assert dx.flatten().tolist() == [2500.0, 0.0, 0.0]


def test_no_rows(device):
    x = torch.zeros(0, 7, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    cuts = torch.zeros(4, dtype=torch.int32, device=device)
    assert select_rows(x, none, backend="triton").shape == (0, 7)
    assert pack(x.view(0, 5, 7), torch.zeros(0, 5, device=device) > 0, backend="triton").shape == (0, 7)
    assert unpack(x, cuts, 0, backend="triton").shape == (3, 0, 7)
    out = unpack(x, cuts, 5, backend="triton")
    assert out.shape == (3, 5, 7) and not out.any()
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == (0, 7)


def test_a_padded_batch_is_read_where_it_lies(device):
    x = torch.randn(7, 13, 37, device=device).transpose(0, 1)  # no copy: [S, B, D] as [B, S, D]
    mask = torch.rand(13, 7, device=device) < 0.5
    out, reads = pack(x, mask, backend="triton"), []
    assert torch.equal(out, x[mask])
    if dispatch.interpreting():

        class Spy:
            def __getitem__(self, grid):
                return lambda x, *arguments, **options: reads.append(x.data_ptr())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_gather_rows_kernel", Spy())
            pack(x, mask, backend="triton")
        assert reads == [x.data_ptr()]


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes_gradcheck(op):
    x = torch.randn(13, 3, dtype=torch.float64, requires_grad=True)
    call = {
        "pack": lambda x: reference.pack(x.view(1, 13, 3), torch.arange(13)[None] % 3 > 0, num_tokens=10),
        "unpack": lambda x: reference.unpack(x, borders((5, 0, 1, 6)), 7),
        "select_rows": lambda x: reference.select_rows(x, torch.tensor([4, 0, 4])),
    }[op]
    assert torch.autograd.gradcheck(call, x)


@pytest.mark.skipif(not dispatch.interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("cols", [1, 768, 1536])
def test_each_row_is_read_once_and_written_once(cols):
    mask = torch.arange(64) < torch.tensor([64, 13, 50, 1])[:, None]
    x = torch.randn(4, 64, cols).requires_grad_()
    with counted() as forward:
        out = pack(x, mask, backend="triton")
    row, tokens = 4 * cols, len(out)
    assert forward.bytes <= 1.05 * tokens * (2 * row + 8)
    with counted() as backward:
        out.backward(torch.ones_like(out))
    assert backward.bytes <= 1.05 * (tokens * row + mask.numel() * (row + 8))


FLOATS, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
CUTS, ROWS = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pack", (FLOATS, MASK.long()), r"mask is torch.int64 \[2, 3\]: expected bool \[B, S\]"),
        ("pack", (FLOATS, MASK.mT), r"mask is torch.bool \[3, 2\]: expected bool \[B, S\], as x \[2, 3, 4\] begins"),
        ("pack", (FLOATS[0, 0], MASK[0, 0]), r"mask is torch.bool \[\]"),
        ("pack", (FLOATS, MASK.to("meta")), "mask is on meta, x is on cpu"),
        ("unpack", (FLOATS[0, 0, 0], CUTS, 2), r"x is \[\]: expected \[T, ...\]"),
        ("unpack", (FLOATS, CUTS.long(), 2), r"cu_seqlens is torch.int64 \[3\]: expected int32 \[B \+ 1\]"),
        ("unpack", (FLOATS, CUTS[:0], 2), r"cu_seqlens is torch.int32 \[0\]"),
        ("unpack", (FLOATS, CUTS + 1, 2), "cu_seqlens begins at 1 and ends at 3: expected 0, and at most 2, the rows"),
        ("unpack", (FLOATS, CUTS[[0, 2, 1]], 2), "cu_seqlens goes down: expected where each sequence begins, in order"),
        ("unpack", (FLOATS, 2 * CUTS[:2], 1), "max_seqlen=1: the longest sequence has 2 tokens"),
        ("unpack", (FLOATS, CUTS, -1), "max_seqlen=-1: expected the length of the longest sequence"),
        ("unpack", (FLOATS, CUTS.to("meta"), 2), "cu_seqlens is on meta, x is on cpu"),
        ("select_rows", (FLOATS[0, 0, 0], ROWS), r"x is \[\]: expected \[T, ...\]"),
        ("select_rows", (FLOATS, ROWS.int()), r"rows is torch.int32 \[2\]: expected int64"),
        ("select_rows", (FLOATS, ROWS[None]), r"rows is torch.int64 \[1, 2\]: expected int64, one axis"),
        ("select_rows", (FLOATS, ROWS + 1), "rows holds 2: expected 0 to 1, the rows of x"),
        ("select_rows", (FLOATS, ROWS - 1), "rows holds -1: expected 0 to 1, the rows of x"),
        ("select_rows", (FLOATS, ROWS.to("meta")), "rows is on meta, x is on cpu"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        OPS[op](*arguments)


def test_a_number_of_tokens_that_does_not_fit_is_named():
    for n in (-1, 7):
        with pytest.raises(ValueError, match=rf"num_tokens={n}: expected 0 to 6, all of mask \[2, 3\]"):
            pack(FLOATS, MASK, num_tokens=n)


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_cannot_run_is_named(op):
    other = {"pack": (MASK,), "unpack": (CUTS, 2), "select_rows": (ROWS,)}[op]
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, triton, reference"):
        OPS[op](FLOATS, *other, backend="cuda")
    with pytest.raises(ValueError, match=f"{op}: backend='triton' (takes|needs) .*: use backend='reference'"):
        OPS[op](FLOATS.double(), *other, backend="triton")
