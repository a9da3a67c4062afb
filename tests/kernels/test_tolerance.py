import pytest
import torch
from tolerance import BACKWARD, assert_as_accurate

REF = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def check(actual, same=REF, ref=REF, **options):
    assert_as_accurate(torch.tensor(actual), same.float(), ref, **options)


def test_the_rounded_reference_passes_and_twice_torchs_error_too():
    check([1.0, -2.0, 3.0])
    check([1.0, -2.0, 3.0199], same=REF + 0.01)


def test_more_than_the_factor_fails_with_the_numbers():
    with pytest.raises(AssertionError, match=r"dq: error 0.03 at \[2\] > 2 x 0.01 \(torch, torch.float32\)"):
        check([1.0, -2.0, 3.03], same=REF + 0.01, name="dq")
    check([1.0, -2.0, 3.0299], same=REF + 0.01, factor=BACKWARD)


def test_a_rounding_error_is_allowed_where_torch_has_none():
    check([1.0 - 2**-24, -2.0, 3.0])
    with pytest.raises(AssertionError, match="error"):
        check([1.0, -2.0, 3.0 + 2**-19])


def test_of_one_element_as_much_rounding_is_allowed_as_of_many():
    ref = torch.tensor([-20.0], dtype=torch.float64)
    check([-20.0 + 2**-19], same=ref, ref=ref)  # (-20 + 0.3) - 0.3 happens to be exact
    with pytest.raises(AssertionError, match="error"):
        check([-20.0 + 2 * 2**-19], same=ref, ref=ref)


def test_zeros_do_not_pass_for_small_gradients():
    ref = 1e-3 * torch.linspace(-3, 3, 999, dtype=torch.float64)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(torch.zeros(999).bfloat16(), ref.bfloat16(), ref, factor=BACKWARD)


def test_nan_and_infinities_must_sit_where_the_reference_has_them():
    inf = float("inf")
    special = torch.tensor([float("nan"), inf, 1.0], dtype=torch.float64)
    check([float("nan"), inf, 1.0], same=special, ref=special)
    for wrong in ([0.0, inf, 1.0], [float("nan"), -inf, 1.0], [float("nan"), inf, float("nan")]):
        with pytest.raises(AssertionError):
            check(wrong, same=special, ref=special)


def test_where_torch_overflows_the_kernel_may_but_need_not():
    same = torch.tensor([1.0, float("inf"), 3.0])
    for second in (float("inf"), -2.0):
        check([1.0, second, 3.0], same=same)
    with pytest.raises(AssertionError):
        check([1.0, float("nan"), 3.0], same=same)


def test_dtype_and_shape_must_agree():
    with pytest.raises(AssertionError, match="float16, expected torch.float32"):
        assert_as_accurate(REF.half(), REF.float(), REF)
    with pytest.raises(AssertionError, match="expected"):
        assert_as_accurate(REF.float()[:2], REF.float()[:2], REF)
