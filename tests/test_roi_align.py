"""RoIAlign against its definition, on both array libraries."""

import pytest

from deformable import ps_roi_align, ps_roi_align_backward, roi_align, roi_align_backward
from tests.golden_cases import check_golden, golden_cases

OPERATORS = {
    "roi_align": (roi_align, roi_align_backward),
    "ps_roi_align": (ps_roi_align, ps_roi_align_backward),
}


@pytest.mark.parametrize(("case", "dtype"), golden_cases("roi_align"))
def test_golden_cases_of_roi_align(case, dtype, xp):
    check_golden(case, dtype, roi_align, roi_align_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("ps_roi_align"))
def test_golden_cases_of_ps_roi_align(case, dtype, xp):
    check_golden(case, dtype, ps_roi_align, ps_roi_align_backward, xp)
