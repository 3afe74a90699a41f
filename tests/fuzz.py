"""Random calls of the library's functions, most of them hostile, and what has to come of them.

A call is made from its number alone. It starts as a small legal one; then the values of its arrays,
their dtypes and how they lie in memory are drawn, and about every third call is spoilt. A call that
is not spoilt has to answer what the loops of ``reference.py`` do, non-finite where they are; one
that is spoilt may also be refused, by a TypeError or ValueError that begins with the function's
name. In no case may it warn, or write into the memory of its arguments.

A new operator is one more entry in ``OPERATORS``.
"""

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import deformable
from deformable._array import compute_dtype
from deformable.testing import error_bound
from tests import reference, reference_roi
from tests.arrays import host

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float32

LARGEST = {"float16": 2.0**15, "bfloat16": 2.0**127, "float32": 2.0**127, "float64": 2.0**1023}
SPACING = {"float16": 2.0**-24}  # of the numbers around 0; those of other dtypes are far closer
STORAGE = tuple(map(np.dtype, (np.float16, bfloat16, np.float32, np.float64)))
NON_FINITE = (math.nan, math.inf, -math.inf)
FAR = (*NON_FINITE, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), -1e-30)
INT_MAX = 2**31 - 1
ANYTHING = -1.0  # the size of terms of which it is not said what comes
MANY = 1000  # pixels of a RoI that are not looped over
WRONG_NUMBERS = (
    *(0, -1, INT_MAX, 2**31, -(2**31), 2**63, -(2**63), 10**400, True, 1.5, -0.0, 1e300, 1j),
    *(None, "2", b"2", "xx", (), (1,), (1, 2, 3), (1, -1), (2, 1.0), [1, 2], {1: 2}, object()),
    *(np.int64(1), np.uint8(2), np.float32(1), np.array([1, 1]), np.array(1), np.array([])),
)
WRONG_DTYPES = ("int64", "uint8", "bool", "complex64", ">f4", ">f8", "longdouble", "O")
DEVICE_DTYPES = WRONG_DTYPES[:4]  # those that cupy has
WRONG_ARRAYS = (None, 1.0, "x", [[1.0]], (), np.float32(1))
WRONG_NAMES = (5, ["rois"], "y", [None], [["x"]], 1.5, object())


@dataclasses.dataclass(frozen=True)
class Operator:
    """What the fuzz has to know of a function and its backward.

    ``draw(rng)`` answers a legal call: float64 arrays, None where an optional one is absent, and
    numbers, each a pair where pairs are taken. Offsets and the like have few bits, so that no
    position is another one in float32 than in float64. ``large(rng)`` is a call that several
    blocks and several threads of a BLAS have work with.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    draw: Callable[[np.random.Generator], tuple[dict, dict]]
    large: Callable[[np.random.Generator], tuple[dict, dict]]
    loops: Callable[..., np.ndarray]
    loops_backward: Callable[..., dict]
    storage: tuple[str, ...] = ("x", "weight", "bias")  # arguments that share one dtype
    positions: tuple[str, ...] = ()  # arguments that say where to look
    optional: tuple[str, ...] = ("bias", "mask")
    picks: bool = False  # a maximum: what it depends on is not the size of x but its sign
    costly: tuple[str, ...] = ()  # numbers that may not be huge
    refuses: Callable[[dict], bool] = lambda arguments: False  # on NumPy, which looks at values

    @property
    def gradients(self):
        """The arguments that have one."""
        return inspect.signature(self.backward).return_annotation._fields


@dataclasses.dataclass
class Call:
    """The arguments of a call, and the memory that its arrays are views of."""

    arguments: dict
    memory: dict
    spoilt: str = ""  # the argument that is no longer legal, or only by chance
    hopeless: bool = False  # whether the call must be refused


# ---- legal calls


def draw_conv2d(rng):
    n, groups, depth = int(rng.choice((0, 1, 1, 2))), *map(int, rng.integers(1, 5, 2))
    kernel, out = rng.integers(1, 4, 2), groups * int(rng.integers(1, 4))
    size, numbers = draw_plane(rng, kernel)
    arrays = {
        "x": rng.normal(size=(n, groups * depth, *size)),
        "weight": rng.normal(size=(out, depth, *kernel)),
        "bias": rng.normal(size=out) if rng.random() < 0.7 else None,
    }
    return arrays, numbers | {"groups": groups}


def draw_deform_conv2d(rng):
    n, groups, own = int(rng.choice((0, 1, 1, 2))), *map(int, rng.integers(1, (5, 3)))
    kernel, out = rng.integers(1, 4, 2), groups * int(rng.integers(1, 3))
    size, numbers = draw_plane(rng, kernel)
    channels, taps = groups * own * int(rng.choice((1, 2, 4))), own * int(kernel.prod())
    step = rng.choice((1, 16))  # on the pixels, and on the border, every other time
    plane = [
        (side + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for side, k, stride, padding, dilation in zip(size, kernel, *numbers.values(), strict=True)
    ]
    arrays = {
        "x": rng.normal(size=(n, channels, *size)),
        "offset": rng.integers(-48, 48, (n, 2 * taps, *plane)) // step * step / 16,
        "weight": rng.normal(size=(out, channels // groups, *kernel)),
        "bias": rng.normal(size=out) if rng.random() < 0.7 else None,
        "mask": rng.normal(size=(n, taps, *plane)) if rng.random() < 0.6 else None,
    }
    return arrays, numbers


def large_conv2d(rng):
    shapes = {"x": (2, 32, 28, 28), "weight": (32, 32, 3, 3), "bias": (32,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}, {"padding": (1, 1)}


def large_deform_conv2d(rng):
    arrays, numbers = large_conv2d(rng)
    arrays["offset"] = rng.normal(0, 2, (2, 36, 28, 28))
    arrays["mask"] = rng.random((2, 18, 28, 28))
    return arrays, numbers


def draw_plane(rng, kernel):
    """Height and width of an image, now and then 0, and numbers that give it a small output."""
    size, numbers = [], []
    for taps in map(int, kernel):
        stride, padding, dilation = (int(rng.choice(c)) for c in ((1, 2, 5), (0, 1, 3), (1, 2, 4)))
        least = max(dilation * (taps - 1) + 1 - 2 * padding, 0)
        size.append(least + int(rng.integers(3)) + stride * int(rng.integers(2)))
        numbers.append((stride, padding, dilation))
    stride, padding, dilation = zip(*numbers, strict=True)
    return size, {"stride": stride, "padding": padding, "dilation": dilation}


def draw_rois(rng, groups=1):
    """Feature maps, RoIs and numbers, of few bits: samples that are equal are so in float32."""
    n, k = int(rng.integers(1, 3)), int(rng.choice((0, 1, 3)))
    output_size = tuple(map(int, rng.choice((1, 2, 4), 2)))
    channels = int(rng.choice((1, 2, 4))) * (groups or math.prod(output_size))
    corner = rng.integers(-32, 64, (k, 2)) / 4
    # truncated, the indices lie in the batch; sizes are negative now and then
    index = rng.integers(0, n, (k, 1)) + rng.choice((-0.75, 0, 0.25), (k, 1)) * (k > 1)
    index[index <= -1] = 0
    arrays = {
        "x": rng.integers(-32, 32, (n, channels, *rng.integers(1, 7, 2))) / 8,
        "rois": np.concatenate((index, corner, corner + rng.integers(-8, 40, (k, 2)) / 4), axis=1),
    }
    scale = float(rng.choice((0.25, 0.5, 1.0, 2.0)))
    return arrays, {"output_size": output_size, "spatial_scale": scale}


def draw_sampling(rng, numbers, least=-1):
    ratios = [ratio for ratio in (-1, 1, 2, 4) if ratio >= least]
    return numbers | {"sampling_ratio": tuple(map(int, rng.choice(ratios, 2)))}


def draw_roi_align(rng):
    arrays, numbers = draw_rois(rng)
    return arrays, draw_sampling(rng, numbers) | {"aligned": bool(rng.integers(2))}


def draw_largest_sample(rng):
    arrays, numbers = draw_rois(rng)
    numbers |= {"aligned": bool(rng.integers(2)), "mode": "max"}
    return arrays, draw_sampling(rng, numbers, least=1)  # whose sums have few bits


def draw_ps_roi_align(rng):
    arrays, numbers = draw_rois(rng, groups=None)
    return arrays, draw_sampling(rng, numbers)


def draw_ps_roi_pool(rng):
    arrays, numbers = draw_rois(rng, groups=(group := rng.choice((None, 1))))
    return arrays, numbers if group is None else numbers | {"group_size": (1, 1)}


def draw_deform_roi_pool(rng):
    arrays, numbers = draw_rois(rng)
    numbers = draw_sampling(rng, numbers) | {"gamma": float(rng.choice((0.125, 0.5)))}
    k, bins = len(arrays["rois"]), numbers["output_size"]
    offset = rng.integers(-8, 8, (k, 2, *bins)) / 4 if rng.random() < 0.8 else None
    mask = rng.normal(size=(k, *bins)) if rng.random() < 0.5 else None
    return arrays | {"offset": offset, "mask": mask}, numbers


def draw_deform_ps_roi_pool(rng):
    arrays, numbers = draw_ps_roi_pool(rng)
    numbers = draw_sampling(rng, numbers, 1) | {"gamma": float(rng.choice((0.125, 0.5)))}
    k, bins = len(arrays["rois"]), numbers["output_size"]
    outs = arrays["x"].shape[1] // math.prod(numbers.get("group_size", bins))
    classes = int(rng.choice([c for c in (1, 2) if outs % c == 0]))
    part = (k, 2 * classes, *rng.integers(1, 4, 2))
    offset = rng.integers(-8, 8, part) / 4 if rng.random() < 0.8 else None
    mask = rng.normal(size=(k, *bins)) if rng.random() < 0.5 else None
    return arrays | {"offset": offset, "mask": mask}, numbers


def large_rois(groups=1, **more):
    """As ``draw``, of 60 RoIs with 7 x 7 bins; ``more`` shapes of arrays follow."""

    def draw(rng):
        shape = (2, 8 * groups, 32, 40)
        corner = rng.integers(0, 24, (60, 2))
        rois = np.concatenate((np.arange(60)[:, None] % 2, corner, corner + 12), axis=1)
        arrays = {"x": rng.normal(size=shape), "rois": rois.astype(float)}
        arrays |= {name: rng.normal(size=(60, *size)) for name, size in more.items()}
        return arrays, {"output_size": (7, 7)}

    return draw


def is_wrong(rois, images):
    """Which RoIs NumPy refuses: indices outside of the batch, numbers that are not finite."""
    index = np.trunc(rois[:, 0].astype(np.float64))
    return ~(np.isfinite(rois.astype(np.float64)).all(axis=1) & (index >= 0) & (index < images))


def loops_over_rois(name):
    """The loops of an operator for RoIs of all kinds: results, and with ``grad_y`` gradients.

    What comes of a wrong RoI is NaN, and it sends nothing back. Anything may come of one with too
    many samples to loop over, and of a bin that sees nothing times a mask or gradient that is not
    finite: 0 or NaN.
    """

    def loops(x, rois, output_size, grad_y=None, size=False, slack=False, **options):
        wrong = is_wrong(rois, len(x))
        extent = np.abs(rois[:, 3:] - rois[:, 1:3]).max(axis=1) * abs(options["spatial_scale"])
        adaptive = min(options.get("sampling_ratio", (1, 1))) < 1
        many = ~wrong & (extent > MANY) if adaptive else np.zeros_like(wrong)
        known = ~(wrong | many)
        own = {k: a for k, a in options.items() if isinstance(a, np.ndarray)}
        of_known = options | {k: a[known] for k, a in own.items()}
        finite = np.isfinite(own.get("mask", np.ones((len(rois), *output_size))))

        def all_of(some, of_wrong, sure):
            everything = np.zeros((len(rois), *some.shape[1:]))
            everything[known], everything[wrong] = some, of_wrong
            sure = sure & ~many.reshape(-1, *[1] * (sure.ndim - 1))
            return np.where(sure, np.abs(everything), ANYTHING) if size else everything

        of_known["slack"] = slack
        if grad_y is None:
            y = reference_roi.pool(name, x, rois[known], output_size, **of_known)
            return all_of(y, np.nan, finite[:, None])
        grads = reference_roi.pool_backward(
            name, grad_y[known], x, rois[known], output_size, size=size, **of_known
        )
        finite = finite.all(axis=(1, 2)) & np.isfinite(grad_y).all(axis=(1, 2, 3)) & ~wrong
        answer = {
            k: all_of(grads[k], 0, finite.reshape(-1, *[1] * (a.ndim - 1))) for k, a in own.items()
        }
        of_x = np.full(x.shape, ANYTHING) if size and many.any() else grads["x"]
        return answer | {"x": of_x}

    return loops


def roi_operator(name, draw, large, **more):
    loops = loops_over_rois(name)
    return Operator(
        getattr(deformable, name), getattr(deformable, f"{name}_backward"), draw, large,
        loops, loops, storage=("x",), optional=("offset", "mask"),
        refuses=lambda arguments: is_wrong(arguments["rois"], len(arguments["x"])).any(),
        **{"positions": ("rois", "offset"), "costly": ("output_size", "group_size")} | more,
    )  # fmt: skip


MOVED = {"offset": (2, 7, 7), "mask": (7, 7)}
OPERATORS = {
    "conv2d": Operator(
        deformable.conv2d,
        deformable.conv2d_backward,
        draw_conv2d,
        large_conv2d,
        reference.conv2d,
        reference.conv2d_backward,
    ),
    "deform_conv2d": Operator(
        deformable.deform_conv2d,
        deformable.deform_conv2d_backward,
        draw_deform_conv2d,
        large_deform_conv2d,
        reference.deform_conv2d,
        reference.deform_conv2d_backward,
        positions=("offset",),
    ),
    "roi_pool": roi_operator("roi_pool", draw_rois, large_rois(), picks=True),
    "roi_align": roi_operator("roi_align", draw_roi_align, large_rois()),
    "largest sample": roi_operator(
        "roi_align", draw_largest_sample, large_rois(), picks=True,
        costly=("output_size", "sampling_ratio"),
    ),
    "ps_roi_pool": roi_operator("ps_roi_pool", draw_ps_roi_pool, large_rois(49)),
    "ps_roi_align": roi_operator("ps_roi_align", draw_ps_roi_align, large_rois(49)),
    "deform_roi_pool": roi_operator(
        "deform_roi_pool", draw_deform_roi_pool, large_rois(**MOVED)
    ),
    "deform_ps_roi_pool": roi_operator(
        "deform_ps_roi_pool", draw_deform_ps_roi_pool, large_rois(49, **MOVED)
    ),
}  # fmt: skip


def legal_call(operator, xp, seed=0, dtype=np.float64, large=False):
    """The arguments of a random legal call, on arrays of ``xp`` of one dtype."""
    arrays, numbers = (operator.large if large else operator.draw)(np.random.default_rng(seed))
    given = {k: a if a is None else xp.asarray(a.astype(dtype)) for k, a in arrays.items()}
    return given | numbers


def results_of(operator, arguments):
    """The result and all gradients, for which the result serves as ``grad_y``."""
    y = operator.forward(**arguments)
    return [y, *(g for g in operator.backward(y, **arguments) if g is not None)]


# ---- hostile calls


def make(operator, xp, rng, dtypes=STORAGE):
    """A call on arrays of ``xp``, with ``grad_y`` and ``wrt`` for the backward.

    The fewer ``dtypes``, the fewer kernels there are to compile.
    """
    arrays, numbers = operator.draw(rng)
    arrays["grad_y"] = rng.normal(size=operator.forward(**arrays, **numbers).shape)
    storage = dtypes[rng.integers(len(dtypes))]
    beside = beside_of(storage) if dtypes is STORAGE else (storage,)
    values = {
        name: a.astype(storage if name in operator.storage else beside[rng.integers(len(beside))])
        for name, a in arrays.items()
        if a is not None
    }
    for name, value in values.items():
        if rng.random() < 0.3:
            poison(rng, value, FAR if name in operator.positions else NON_FINITE)
    if rng.random() < 0.2:  # huge numbers in one array only: products of two would overflow
        name = rng.choice([name for name in values if name not in operator.positions])
        huge = 1e3 if storage == np.float16 else 1e300 if values[name].dtype == np.float64 else 1e30
        poison(rng, values[name], (huge, -huge))

    laid = {name: lay(rng, xp, value) for name, value in values.items()}
    call = Call(
        {name: laid[name][0] if name in laid else None for name in arrays} | numbers,
        {name: memory for name, (_, memory) in laid.items()},
    )
    if rng.random() < 0.5:
        call.arguments["wrt"] = [str(name) for name in rng.permuted(operator.gradients)[:2]]
    if rng.random() < 0.3:
        SPOILERS[rng.integers(len(SPOILERS))](operator, call, xp, rng)
    return call


def beside_of(storage):
    """The dtypes that offsets, masks and gradients may have beside arrays of ``storage``."""
    return (storage, *(d for d in map(np.dtype, (np.float32, np.float64)) if d != storage))


def poison(rng, value, choices):
    """Overwrite up to three elements."""
    flat = value.reshape(value.size)
    for _ in range(min(value.size, int(rng.integers(1, 4)))):
        with np.errstate(over="ignore"):
            flat[rng.integers(value.size)] = choices[rng.integers(len(choices))]


def lay(rng, xp, value):
    """An array of random strides that holds ``value``, and the memory that it is a view of."""
    if rng.random() < 0.3:
        array = xp.asarray(value)
        return array, array
    if xp is np and rng.random() < 0.15:  # at an odd address
        memory = np.zeros(value.nbytes + 1, np.uint8)
        array = memory[1:].view(value.dtype).reshape(value.shape)
        array[...] = value
        return array, memory
    order = [int(axis) for axis in rng.permutation(value.ndim)]
    steps = rng.choice((1, 1, 1, -1, 2, -3, 0), value.ndim)
    before, behind = rng.integers(0, 3, (2, value.ndim))
    if rng.random() < 0.3:  # contiguous: Fortran's order, or channels-last, or another one
        steps, before, behind = (np.full(value.ndim, n) for n in (1, 0, 0))
        axes = list(range(value.ndim))
        order = [axes[::-1], axes[:1] + axes[2:] + axes[1:2], order][rng.integers(3)]
    shape, view = [], []
    for axis in range(value.ndim):
        length = (value.shape[axis] - 1) * abs(int(steps[axis])) + 1 if value.shape[axis] else 0
        first, last = int(before[axis]), int(before[axis]) + length - 1
        shape.append(first + length + int(behind[axis]))
        if not length:
            view.append(slice(first, first))
        elif steps[axis] >= 0:
            view.append(slice(first, last + 1, max(int(steps[axis]), 1)))
        else:
            stop = first - 1
            view.append(slice(last, stop if stop >= 0 else None, int(steps[axis])))
    start = int(rng.integers(4))  # of elements: not where vectors of them may be loaded
    memory = xp.full(start + math.prod(shape), np.nan, value.dtype)
    array = memory[start:].reshape([shape[axis] for axis in order])
    array = array.transpose([order.index(axis) for axis in range(value.ndim)])[tuple(view)]
    array[...] = xp.asarray(value[tuple(slice(0, 1) if s == 0 else slice(None) for s in steps)])
    array = xp.broadcast_to(array, value.shape)
    if xp is np and array.flags.writeable and rng.random() < 0.5:
        array.flags.writeable = False
    return array, memory


def spoil_shape(operator, call, xp, rng):
    """Other shapes; by chance they may fit."""
    call.spoilt, array = choose_array(call, xp, rng)
    axis, other = map(int, rng.integers(array.ndim, size=2))
    everything = (slice(None),) * axis
    call.arguments[call.spoilt] = (
        lambda: array[None],
        lambda: array[..., None],
        lambda: array[(*everything, slice(0, -1))],
        lambda: array[(*everything, slice(0, 0))],
        lambda: array[(*everything, 0)] if array.shape[axis] else array[None],
        lambda: xp.concatenate((array, array), axis),
        lambda: array.swapaxes(axis, other),
        lambda: array.reshape(array.size),
        lambda: xp.zeros((), array.dtype),
    )[rng.integers(9)]()


def spoil_dtype(operator, call, xp, rng):
    """A dtype that is never taken, or one that may not be taken here."""
    call.spoilt, array = choose_array(call, xp, rng)
    call.hopeless = rng.random() < 0.7
    choices = STORAGE if not call.hopeless else WRONG_DTYPES if xp is np else DEVICE_DTYPES
    with np.errstate(all="ignore"):
        call.arguments[call.spoilt] = array.astype(choices[rng.integers(len(choices))])


def spoil_array(operator, call, xp, rng):
    """What is no array, or an array of another library."""
    call.spoilt, array = choose_array(call, xp, rng)
    call.hopeless = True
    if "cupy" in sys.modules and rng.random() < 0.4:
        other = sys.modules["cupy"] if xp is np else np
        call.arguments[call.spoilt] = other.zeros(array.shape, array.dtype)
    else:
        first = int(call.spoilt in operator.optional)  # these may be None
        call.arguments[call.spoilt] = WRONG_ARRAYS[rng.integers(first, len(WRONG_ARRAYS))]


def spoil_number(operator, call, xp, rng):
    """Numbers that are none, too small or too large; some of them are legal."""
    kinds = (int, float, tuple)  # and no bool, as which everything may serve
    names = [name for name, value in call.arguments.items() if type(value) in kinds]
    call.spoilt = names[rng.integers(len(names))]
    value = WRONG_NUMBERS[rng.integers(len(WRONG_NUMBERS))]
    huge = value is INT_MAX and call.spoilt in operator.costly
    call.arguments[call.spoilt] = 0 if huge else value


def spoil_names(operator, call, xp, rng):
    """Gradients that there are not."""
    call.spoilt, call.hopeless = "wrt", True
    call.arguments["wrt"] = WRONG_NAMES[rng.integers(len(WRONG_NAMES))]


SPOILERS = (spoil_shape, spoil_shape, spoil_dtype, spoil_array, spoil_number, spoil_names)


def choose_array(call, xp, rng):
    names = [name for name, value in call.arguments.items() if isinstance(value, xp.ndarray)]
    name = names[rng.integers(len(names))]
    return name, call.arguments[name]


# ---- what has to come


def check(operator, xp, number, dtypes=STORAGE):
    """Make call ``number`` and check its results."""
    call = make(operator, xp, np.random.default_rng(number), dtypes)
    before = {name: host(xp, memory).tobytes() for name, memory in call.memory.items()}
    alone = {k: v for k, v in call.arguments.items() if k not in ("grad_y", "wrt")}
    refused = xp is np and call.spoilt not in ("x", "rois") and operator.refuses(alone)
    y = answer(operator.forward, alone, call, refused)
    grads = answer(operator.backward, call.arguments, call, refused)
    for name, memory in call.memory.items():
        assert host(xp, memory).tobytes() == before[name], f"{name} was written into"
    if any(abs(v) > 1e6 for v in alone.values() if type(v) in (int, float)):
        return  # a legal spatial_scale or gamma with which positions overflow
    if y is not None:
        want = expected(operator.loops, operator, xp, alone)
        check_result("y", xp, call, y, call.arguments["x"].dtype, *want)
    if grads is not None:
        assert y is not None
        want, size, slack = expected(operator.loops_backward, operator, xp, call.arguments)
        chosen = call.arguments.get("wrt")
        for name, gradient in grads._asdict().items():
            if name not in want or (chosen is not None and name not in chosen):
                assert gradient is None, f"{name} has a gradient"
            else:
                dtype = call.arguments[name].dtype
                check_result(name, xp, call, gradient, dtype, want[name], size[name], slack[name])


def answer(function, arguments, call, refused):
    """What the function returns, or None where it refuses a call as documented."""
    spoilt = call.spoilt in arguments
    try:
        result = function(**arguments)
    except (TypeError, ValueError) as error:
        if not (spoilt or refused) or not str(error).startswith(f"{function.__name__}: "):
            raise
        return None
    assert not (spoilt and call.hopeless), f"{function.__name__} took a wrong {call.spoilt}"
    assert not refused, f"{function.__name__} took wrong values"
    return result


def check_result(name, xp, call, have, dtype, want, size, slack):
    assert isinstance(have, xp.ndarray) and have.dtype == dtype, name
    assert have.shape == want.shape, f"{name} has shape {have.shape}, expected {want.shape}"
    for memory in call.memory.values():
        assert not xp.may_share_memory(have, memory), f"{name} lies in the memory of an argument"
    have = host(xp, have).astype(np.float64)
    terms = sum(memory.size for memory in call.memory.values()) + 1
    storage = call.arguments["x"].dtype
    # half precision also rounds intermediate results: twice the error of a single rounding
    bound = error_bound(storage, size, terms) * (2 if storage.itemsize == 2 else 1)
    bound = np.maximum(bound, error_bound(dtype, size)) + terms * SPACING.get(storage.name, 0)
    bound += slack
    with np.errstate(invalid="ignore"):
        may_overflow = ~(size < min(LARGEST[dtype.name], LARGEST[storage.name]) / 16)
        good = np.where(
            np.isfinite(want), may_overflow | (np.abs(have - want) <= bound), ~np.isfinite(have)
        )
        good |= size == ANYTHING
    assert good.all(), f"{name}: {have[~good][:4]}, expected {want[~good][:4]}"


def expected(loops, operator, xp, arguments):
    """By the loops: results, the sums of the absolute values of their terms, and their slack.

    That is by how much the roundings of positions may change them, over the finite values: whether
    a weight is 0, what stands there being infinite, is not up to rounding.
    """
    with np.errstate(all="ignore"):
        exact = plain(operator, xp, {k: v for k, v in arguments.items() if k != "wrt"})
        want, takes = loops(**exact), inspect.signature(loops).parameters
        size = loops(**absolute(operator, exact), **{"size": True} if "size" in takes else {})
        if "slack" in takes:
            slack = loops(**absolute(operator, exact, finite=True), slack=True)
        else:
            slack = dict.fromkeys(want, 0) if isinstance(want, dict) else 0
    return want, size, slack


def plain(operator, xp, arguments):
    """The arguments as the loops take them: float64, pairs where there may be pairs."""
    legal = operator.draw(np.random.default_rng(0))[1]
    sums = compute_dtype(arguments["x"].dtype)  # what 1e300 is infinite in
    exact = {}
    for name, value in arguments.items():
        if value is not None and isinstance(legal.get(name), tuple):
            exact[name] = tuple(map(int, value if np.ndim(value) else (value, value)))
        elif isinstance(value, xp.ndarray):
            kept = value.dtype if name in operator.positions else sums
            exact[name] = host(xp, value).astype(kept).astype(np.float64)
        else:
            exact[name] = value
    return exact


def absolute(operator, exact, finite=False):
    """The arguments with absolute values, those that are not ``finite`` taken as 0 if asked for."""
    signed = (*operator.positions, *(("x",) if operator.picks else ()))
    return {
        name: np.where(np.isfinite(a) | (not finite), np.abs(a), 0)
        if isinstance(a, np.ndarray) and name not in signed
        else a
        for name, a in exact.items()
    }
