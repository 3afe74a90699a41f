"""Checks of arguments that every function shares."""

import numpy as np
import pytest

import deformable
from deformable._array import real_number


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32(np.inf), 10**400], ids=type)
def test_a_number_that_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=r"f: scale is .*, expected a finite number"):
        real_number("f", "scale", value)


@pytest.mark.parametrize("value", ["1", None, True, 1j, np.ones(1), np.bool_(True)])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"f: scale is .*, expected a number"):
        real_number("f", "scale", value)


@pytest.mark.parametrize("value", [2, 2.0, np.int8(2), np.float16(2)])
def test_a_number_becomes_a_float(value):
    assert type(real_number("f", "scale", value)) is float


# ---- how a call is done is kept, and looked up by shapes, dtypes and options


def call(name, **changes):
    arrays = {"x": np.ones((1, 2, 4, 4), np.float32)}
    if "conv" in name:
        arrays["weight"] = np.ones((2, 2, 1, 1), np.float32)
    else:
        arrays["rois"] = np.array([[0, 0, 0, 3, 3]], np.float32)
    if name == "deform_conv2d":
        arrays["offset"] = np.zeros((1, 2, 4, 4), np.float32)
    return getattr(deformable, name)(**arrays | changes)


@pytest.mark.parametrize(
    ("name", "option", "right", "wrong"),
    [
        ("conv2d", "stride", 1, True),
        ("conv2d", "groups", 1, 1.0),
        ("deform_conv2d", "dilation", (1, 1), (1, True)),
        ("deform_conv2d", "padding", 0, False),
        ("deform_conv2d", "padding", (0, 0), (0.0, 0)),
        ("roi_pool", "spatial_scale", 1.0, True),
        ("roi_pool", "output_size", 1, 1.0),
    ],
)
def test_an_option_equal_to_a_right_one_is_refused(name, option, right, wrong):
    size = {} if "conv" in name else {"output_size": 1}
    call(name, **size | {option: right})
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: {option} is "):
            call(name, **size | {option: wrong})


@pytest.mark.parametrize(
    "stride", [2, (2, 2), [2, 2], np.int64(2), np.array([2, 2])], ids=lambda value: str(type(value))
)
def test_any_spelling_of_an_option_does_the_same(stride):
    assert call("conv2d", stride=stride).shape == (1, 2, 2, 2)


@pytest.mark.parametrize("name", ["conv2d", "deform_conv2d", "roi_pool"])
@pytest.mark.parametrize("dtype", [">f4", np.int32, np.float16])
def test_dtypes_are_checked_in_every_call(name, dtype):
    size = {} if "conv" in name else {"output_size": 1}
    other = "weight" if "conv" in name else "rois"
    call(name, **size)
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: {other} has dtype "):
            call(name, **size | {other: np.ones((2, 5 if size else 2), dtype)})
