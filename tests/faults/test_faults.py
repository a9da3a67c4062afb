"""Each fault of the table in docs/trust.md, a few times; the script tries each as often as the page says."""

import pytest

from faults import FAULTS, attempt


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_minibert_holds_against(fault):
    result = attempt(fault, fault.quick)
    if result.skipped:
        pytest.skip(result.skipped)
    assert result.problems == [] and result.held == result.tried >= min(fault.quick, 2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_minibert_holds_as_often_as_the_page_says(fault):
    result = attempt(fault, fault.full)
    if result.skipped:
        pytest.skip(result.skipped)
    assert result.problems == []
