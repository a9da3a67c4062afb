import random
from dataclasses import dataclass

import pytest
import torch
from harness import DTYPES, LAYOUTS, SEED, arrange, check, repeat_with, values_and_gradients
from pairwise import pairwise
from tolerance import assert_as_accurate

from minibert_kernels import dispatch, embedding, philox, reference
from minibert_kernels.embedding import embed_norm
from minibert_kernels.traffic import counted

TABLES = ("word", "position", "type")


def kernel(*arguments, **options):
    return embed_norm(*arguments, **options, backend="triton")


@dataclass(frozen=True)
class Case:
    seed: int
    tokens: int
    cols: int
    sizes: tuple = (11, 7, 2)  # of the tables; None where there are no positions
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    layouts: tuple = ("contiguous",) * 4
    bias: bool = True
    dropout: float = 0.0
    rows: bool = False
    eps: float = 1e-12

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        cols = rng.choice([1, 2, 7, 16, 37, 64, 100, 128, 257, rng.randint(1, 300), rng.randint(1, 64)])
        dtype = rng.choice(DTYPES)
        return cls(
            seed=seed,
            tokens=rng.choice([0, 1, 13, 25, rng.randint(1, 40)]),
            cols=cols,
            sizes=(rng.choice([5, 11, 11, 200]), rng.choice([None, 1, 7, 40]), rng.choice([1, 2, 5])),
            dtype=dtype,
            param_dtype=rng.choice([dtype, torch.float32]),
            # of one word, and so of one token's statistics, the error is luck
            layouts=(rng.choice(LAYOUTS[:-1]), *(rng.choice(LAYOUTS) for _ in range(3))),
            bias=rng.random() < 0.7,
            dropout=rng.choice([0.0, 0.1, 0.5]),
            rows=rng.random() < 0.5,
            # a row of one or two columns has gradients of nothing but cancellation where eps is small
            eps=rng.choice([1e-12, 1e-5]) if cols >= 16 else 0.1,
        )

    def run(self, device):
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(2**62, (self.tokens,), generator=generator).to(device) if self.rows else None
        with repeat_with(self, device):
            check(
                lambda **tensors: kernel(**tensors, rows=rows),
                lambda **tensors: reference.embed_norm(**tensors, rows=rows),
                lambda **tensors: reference.embed_norm(**tensors, rows=rows),
                lambda: self.inputs(device, generator),
                draws=8 if self.dtype == torch.float32 and self.cols < 1024 else 2,  # in others rounding says more
                dropout=self.dropout, seed=self.seed, eps=self.eps,
            )  # fmt: skip

    def inputs(self, device, generator):
        def normal(shape, dtype, layout="contiguous"):
            return arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)

        tensors = {}
        names = zip(TABLES, ("ids", "positions", "type_ids"), self.sizes, self.layouts, strict=False)
        for table, index, size, layout in names:
            tensors[table] = tensors[index] = None
            if size is not None:
                tensors[table] = normal((size, self.cols), self.dtype, layout)
                tensors[index] = torch.randint(size, (self.tokens,), generator=generator).to(device)
        tensors["weight"] = normal((self.cols,), self.param_dtype)
        tensors["bias"] = normal((self.cols,), self.param_dtype) if self.bias else None
        return tensors, [normal((self.tokens, self.cols), self.dtype, self.layouts[3])]


def test_any_call_is_as_accurate_as_torch(fuzz_seed, device, poisoned):
    Case.draw(fuzz_seed).run(device)


@pytest.mark.parametrize(
    ("cols", "dtype", "dropout"),
    pairwise([1, 37, 768, 1024, 8192], DTYPES, [0.0, 0.1], always=[(768, torch.bfloat16, 0.1)]),
)
def test_values_and_gradients_at_the_widths_of_berts(cols, dtype, dropout, device, poisoned):
    tokens = 5 if cols == 8192 else 35  # more than one tile a program of the backward
    Case(
        seed=cols, tokens=tokens, cols=cols, dtype=dtype, param_dtype=dtype, dropout=dropout,
        eps=0.1 if cols == 1 else 1e-12,
    ).run(device)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tables_of_bert(dtype):
    Case(seed=1, tokens=16384, cols=768, sizes=(30522, 512, 2), dtype=dtype, dropout=0.1).run("cuda")


def test_a_wrong_scale_of_the_survivors_fails_and_prints_the_line_that_repeats_it(device, monkeypatch, few_draws):
    monkeypatch.setattr(embedding, "keep_scale", lambda p: 1.0)
    with pytest.raises(AssertionError, match="error") as failure:
        Case(seed=3, tokens=13, cols=37, dropout=0.5).run(device)
    (line,) = failure.value.__notes__
    with pytest.raises(AssertionError, match="error"):
        eval(line.removeprefix("repeat with: "))


def inputs(device, tokens=13, cols=37, dtype=torch.float32):
    tensors, _ = Case(seed=0, tokens=tokens, cols=cols, dtype=dtype).inputs("cpu", torch.Generator().manual_seed(0))
    return {name: t.to(device) for name, t in tensors.items()}


def test_in_float32_the_sum_is_taken_in_the_order_of_the_reference(device):
    tensors = inputs(device, 1, 1) | {
        name: torch.zeros(1, dtype=torch.int64, device=device) for name in ("ids", "type_ids", "positions")
    }
    # 1e8 - 1e8 + 1 is 1 in this order alone
    for name, value in (("word", 1e8), ("type", -1e8), ("position", 1.0)):
        tensors[name] = torch.tensor([[value, 0.0]], device=device)
    tensors |= {"weight": torch.ones(2, device=device), "bias": None}
    assert kernel(**tensors).tolist() == reference.embed_norm(**tensors).tolist() == [[1.0, -1.0]]


def test_dropout_draws_the_mask_of_the_numpy_twin(device):
    rows = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**32 + 5, 2**62 + 9, -3], device=device)
    tensors = inputs(device, 7, 100)
    tensors |= {"weight": torch.zeros(100, device=device), "bias": torch.ones(100, device=device)}
    out = kernel(**tensors, dropout=0.3, seed=SEED, rows=rows)
    column = torch.arange(100).numpy()
    group, byte = column // 16, column % 16
    for row, kept in zip(rows.tolist(), (out != 0).tolist(), strict=True):
        words = philox.philox(SEED, group, 0, row, row >> 32)
        drawn = [(int(words[b // 4][i]) >> 8 * (b % 4)) & 0xFF for i, b in enumerate(byte)]
        assert kept == [d >= round(0.3 * 256) for d in drawn]
    torch.testing.assert_close(out.unique().cpu(), torch.tensor([0.0, 256 / (256 - 77)]))


def test_padded_packed_and_rebatched_tokens_agree(device):
    tensors = inputs(device, 13 * 7)
    rows = torch.arange(13 * 7, device=device) + 2**33
    options = {"dropout": 0.3, "seed": SEED}
    padded = kernel(**tensors, rows=rows, **options)
    mask = torch.rand(13 * 7, device=device) < 0.6
    for chosen in (mask.nonzero()[:, 0], torch.randperm(13 * 7, device=device)):
        few = tensors | {name: tensors[name][chosen] for name in ("ids", "type_ids", "positions")}
        assert torch.equal(kernel(**few, rows=rows[chosen], **options), padded[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_tables_come_out_as_the_reference_has_them(dtype, device, poisoned):
    tensors = inputs(device, 11, dtype=dtype)
    tensors["ids"] = torch.arange(11, device=device)
    tensors["type_ids"] = torch.tensor([0] * 6 + [1] * 5, device=device)
    word = tensors["word"]
    word *= torch.tensor([1e4, 1e-4, *[1.0] * 9], device=device, dtype=dtype)[:, None]
    word[2, 3], word[3, 4], word[4, 5] = float("inf"), float("-inf"), float("nan")
    word[6:], tensors["type"][1], tensors["position"][:] = 2.0, 3.0, 1.0
    douts = [torch.ones(11, 37, device=device)]
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    ours, torchs, exact = (
        values_and_gradients(op, arguments, douts, eps=1e-5)
        for op, arguments in ((kernel, tensors), (reference.embed_norm, tensors), (reference.embed_norm, wide))
    )
    assert_as_accurate(ours["out"], torchs["out"], exact["out"])
    assert torch.equal(ours["out"][6:], tensors["bias"].to(dtype).expand(5, -1)), "the rows have no variance"
    for name in ("dword", "dtype"):
        assert torch.equal(ours[name].isfinite(), exact[name].isfinite()), name


def test_tokens_of_equal_values_come_out_as_the_bias(device, poisoned):
    ids, zeros = torch.arange(5, device=device), torch.zeros(5, 768, device=device)
    word, (weight, bias) = torch.full_like(zeros, 1000.1), torch.randn(2, 768, device=device)
    out = kernel(ids, ids, ids, word, zeros, zeros, weight, bias)
    assert torch.equal(out, bias.expand(5, -1))


def test_no_tokens_give_empty_values_and_zero_gradients(device):
    tensors = inputs(device, 0)
    results = values_and_gradients(kernel, tensors, [torch.zeros(0, 37, device=device)], dropout=0.1)
    assert results.pop("out").shape == (0, 37)
    assert len(results) == 5
    for name, gradient in results.items():
        assert gradient.shape == tensors[name[1:]].shape and not gradient.any(), name


@pytest.mark.parametrize("op", [kernel, reference.embed_norm])
def test_tokens_after_the_last_sequence_without_a_gradient_add_nothing_to_the_tables(op, device, poisoned):
    tensors, dout = inputs(device), torch.randn(13, 37, device=device)
    dout[9:] = 0.0
    static = values_and_gradients(op, tensors, [dout], dropout=0.3)
    few = tensors | {name: tensors[name][:9] for name in ("ids", "type_ids", "positions")}
    plain = values_and_gradients(op, few, [dout[:9]], dropout=0.3)
    assert torch.equal(static.pop("out")[:9], plain.pop("out"))
    torch.testing.assert_close(static, plain)
    assert torch.equal(static["dword"] == 0, plain["dword"] == 0)


def test_under_autocast_the_result_is_in_its_dtype_and_gradients_are_taken_in_float32(device):
    tensors, dout = inputs(device), torch.randn(13, 37, device=device).half()
    plain = values_and_gradients(kernel, tensors, [dout.float()], dropout=0.3)
    with torch.autocast(device, torch.float16):
        results = values_and_gradients(kernel, tensors, [dout], dropout=0.3)
        others = values_and_gradients(reference.embed_norm, tensors, [dout], dropout=0.3)
    assert results["out"].dtype == others["out"].dtype == torch.float16
    assert torch.equal(results["out"], plain["out"].half())
    for name in plain.keys() - {"out"}:
        assert torch.equal(results[name], plain[name]), name
        torch.testing.assert_close(others[name], plain[name], rtol=1e-3, atol=1e-4)


def test_only_tables_that_ask_for_a_gradient_cost_one(device, monkeypatch):
    sums = []

    def spy(x, keys, sizes):
        sums.extend(sizes)
        return original(x, keys, sizes)

    original = embedding.segment_sums
    monkeypatch.setattr(embedding, "segment_sums", spy)
    tensors = inputs(device)
    full = values_and_gradients(kernel, tensors, [torch.ones(13, 37, device=device)])
    assert sums == [11, 7, 2]
    for wanted, expected in ((("word",), [11]), (("type", "weight"), [2]), (("weight", "bias"), [])):
        sums.clear()
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        kernel(**leaves).sum().backward()
        assert sums == expected
        for name in wanted:
            assert torch.equal(leaves[name].grad, full[f"d{name}"])


def test_a_word_table_tied_to_the_decoder_gets_both_gradients(device):
    tensors = inputs(device)
    ours, theirs = (
        values_and_gradients(
            lambda op=op, **tensors: op(**tensors) @ tensors["word"].mT, tensors, [torch.ones(13, 11, device=device)]
        )
        for op in (kernel, reference.embed_norm)
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_positions_are_passed_over_where_there_is_no_table(device):
    tensors = inputs(device) | {"position": None}
    assert torch.equal(kernel(**tensors), kernel(**tensors | {"positions": None}))


def test_the_reference_passes_gradcheck_with_dropout():
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in inputs("cpu", 5, 7).items()}
    names = [name for name, t in tensors.items() if t.is_floating_point()]

    def call(*values):
        return reference.embed_norm(**tensors | dict(zip(names, values, strict=True)), dropout=0.4, seed=4)

    assert torch.autograd.gradcheck(call, [tensors[name].requires_grad_() for name in names])


@pytest.mark.skipif(not dispatch.interpreting(), reason="counts in the interpreter")
def test_each_token_is_gathered_and_written_once():
    # every token has its own rows of all tables, so that each row is moved once
    tokens, cols = 64, 768
    tensors = {name: torch.arange(tokens) for name in ("ids", "type_ids", "positions")}
    tensors |= {name: torch.randn(tokens, cols).half() for name in TABLES}
    tensors |= {name: torch.randn(cols) for name in ("weight", "bias")}
    tensors["weight"].requires_grad_()
    row, vector = 2 * cols, 4 * cols
    with counted() as forward:
        out = kernel(**tensors, dropout=0.1)
    assert forward.bytes <= 1.05 * (tokens * (4 * row + 40) + 2 * vector)
    with counted() as backward:
        out.backward(torch.ones_like(out))
    # the programs' partial sums of dweight and dbias are the rest: two programs in the interpreter
    assert backward.bytes <= 1.05 * (tokens * (4 * row + 40) + (1 + 2 * 2) * vector)


TENSORS = inputs("cpu", 5, 8)
IDS = TENSORS["ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS.int()}, r"ids is torch.int32 \[5\]: expected int64, one for each id"),
        ({"ids": IDS[None]}, r"ids is torch.int64 \[1, 5\]"),
        ({"type_ids": IDS[:4]}, r"type_ids is torch.int64 \[4\]: expected int64, one for each id"),
        ({"positions": IDS.float()}, r"positions is torch.float32 \[5\]"),
        ({"positions": None}, "positions is None, position is a table"),
        ({"rows": IDS[:4]}, r"rows is torch.int64 \[4\]: expected int64, one for each id"),
        ({"ids": IDS * 0 + 11}, "ids holds 11: expected 0 to 10, the rows of its table"),
        ({"ids": IDS * 0 - 1}, "ids holds -1: expected 0 to 10"),
        ({"type_ids": IDS * 0 + 2}, "type_ids holds 2: expected 0 to 1"),
        ({"positions": IDS * 0 + 7}, "positions holds 7: expected 0 to 6"),
        ({"word": torch.zeros(8)}, r"word is \[8\]: expected \[V, D\]"),
        ({"word": torch.zeros(11, 0)}, r"word is \[11, 0\]: expected \[V, D\] with D of at least 1"),
        (
            {"type": torch.zeros(2, 7)},
            r"type is torch.float32 \[2, 7\]: expected a table of torch.float32 with 8 columns",
        ),
        (
            {"position": torch.zeros(7, 8).half()},
            r"position is torch.float16 \[7, 8\]: expected a table of torch.float32",
        ),
        ({name: TENSORS[name].long() for name in TABLES}, "word is torch.int64: expected one of float32, bfloat16"),
        ({"weight": torch.zeros(8).int()}, "weight is torch.int32: expected one of float32, bfloat16"),
        ({"bias": torch.zeros(8).bool()}, "bias is torch.bool: expected one of float32, bfloat16"),
        ({"weight": torch.zeros(7)}, r"weight is \[7\]: expected \[8\]"),
        ({"bias": torch.zeros(8, 1)}, r"bias is \[8, 1\]: expected \[8\]"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta, word is on cpu"),
        ({"ids": IDS.to("meta")}, "ids is on meta, word is on cpu"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"seed": torch.zeros(2), "dropout": 0.1}, r"seed is torch.float32 \[2\]"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, reference"),
        (
            {name: TENSORS[name].double() for name in TABLES} | {"backend": "triton"},
            "embed_norm: backend='triton' (takes|needs) .*: use backend='reference'",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        embed_norm(**TENSORS | change)


def test_tables_too_wide_for_the_kernel_run_the_reference(device):
    tensors = inputs(device, 3, 8193)
    with pytest.raises(ValueError, match="takes up to 8192 columns, got 8193"):
        kernel(**tensors)
    assert torch.equal(embed_norm(**tensors), reference.embed_norm(**tensors))
