import pytest

from deformable import (
    deform_ps_roi_pool,
    deform_ps_roi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
)
from tests.golden_cases import check_golden, golden_cases


@pytest.mark.parametrize(("case", "dtype"), golden_cases("deform_roi_pool"))
def test_golden_cases_of_deform_roi_pool(case, dtype, xp):
    check_golden(case, dtype, deform_roi_pool, deform_roi_pool_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("deform_ps_roi_pool"))
def test_golden_cases_of_deform_ps_roi_pool(case, dtype, xp):
    check_golden(case, dtype, deform_ps_roi_pool, deform_ps_roi_pool_backward, xp)
