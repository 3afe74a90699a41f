import pytest

from deformable import ps_roi_pool, ps_roi_pool_backward, roi_pool, roi_pool_backward
from tests.golden_cases import check_golden, golden_cases


@pytest.mark.parametrize(("case", "dtype"), golden_cases("roi_pool"))
def test_golden_cases_of_roi_pool(case, dtype, xp):
    check_golden(case, dtype, roi_pool, roi_pool_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("ps_roi_pool"))
def test_golden_cases_of_ps_roi_pool(case, dtype, xp):
    check_golden(case, dtype, ps_roi_pool, ps_roi_pool_backward, xp)
