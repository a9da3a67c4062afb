"""The one tolerance of the kernel tests: how far from the float64 reference a kernel may be.

With e(y) = max|y - ref64|: e(kernel) <= factor * e(torch in the same dtype) + rounding, where the factor is 2 forward
and 3 backward. rounding is one unit in the last place of max|ref| + 0.3: the most that 2 * |(ref + 0.3 - 0.3) - ref|
can be in that dtype, whatever it happens to be for a few elements. NaN and infinities must sit where the reference
has them.
"""

import math

import torch

FORWARD, BACKWARD = 2.0, 3.0


def assert_as_accurate(actual, same_dtype, ref64, *, factor=FORWARD, name="output"):
    """Hold a kernel's result to torch's own error in the same dtype.

    Args:
        actual: the kernel's result.
        same_dtype: what plain torch computes from the same inputs, in the dtype of `actual`.
        ref64: what the reference computes from the same inputs in float64.
        factor: FORWARD for values, BACKWARD for gradients.
        name: names the tensor in the message.
    """
    assert actual.dtype == same_dtype.dtype, f"{name} is {actual.dtype}, expected {same_dtype.dtype}"
    assert actual.shape == ref64.shape == same_dtype.shape, f"{name} is {actual.shape}, expected {ref64.shape}"
    # what does not fit the dtype is an infinity there; where torch itself overflowed, the kernel may too
    rounded = ref64.to(actual.dtype)
    special = ~rounded.isfinite() | ~same_dtype.isfinite()
    excused = special & (_same(actual, rounded) | _same(actual, same_dtype))
    wrong = ~rounded.isfinite() & ~excused
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} NaN or infinities differ, the first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0]} instead of {rounded[wrong][0]}"
    )
    ours, theirs = _error(actual, ref64, ~excused), _error(same_dtype, ref64, ~special)
    rounding = _last_place(torch.where(special, 0, ref64).abs().amax() + 0.3, actual.dtype) if ours.any() else 0.0
    assert ours.max() <= factor * theirs.max() + rounding, (
        f"{name}: error {ours.max():.3g} at {list(_unravel(ours.argmax(), ours.shape))} > "
        f"{factor:g} x {theirs.max():.3g} (torch, {actual.dtype}) + {rounding:.3g} (rounding)"
    )


def _same(a, b):
    return (a == b) | (a.isnan() & b.isnan())


def _error(a, b, where):
    """|a - b| where asked, else 0; NaN counts as infinite. A single 0 where there is no element."""
    error = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.where(where, error, 0) if error.numel() else error.new_zeros(1)


def _last_place(x, dtype):
    """The distance of dtype's numbers at x > 0."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(x))


def _unravel(index, shape):
    return (int(i) for i in torch.unravel_index(index, shape))
