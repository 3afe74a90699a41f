"""The golden cases of an operator, and how far a result may be from them."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
BOUNDS = {np.float64: 1e-12, np.float32: 2e-6}
FINITE_DIFFERENCES = 1e-5  # of gradients whose notes say that they come from finite differences


def golden_cases(op):
    """pytest parameters (case, dtype) for every golden case of ``op``."""
    return [
        pytest.param(case, dtype, id=f"{case['file'].split('__')[1][:-4]}-{dtype.__name__}")
        for case in CASES
        if case["op"] == op
        for dtype in BOUNDS
    ]


def check_golden(case, dtype, forward, backward, xp):
    """Run ``forward`` and ``backward`` on the case's arrays and compare each result."""
    with np.load(FOLDER / case["file"]) as data:
        arrays = {k: v for k, v in data.items() if k != "y" and not k.startswith("grad_")}
        expected = {"y": data["y"]}
        expected |= {k[5:]: v for k, v in data.items() if k.startswith("grad_") and k != "grad_y"}
        grad_y = data["grad_y"]
    arrays = {name: xp.asarray(a.astype(dtype)) for name, a in arrays.items()}
    keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in case["kwargs"].items()}
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.default is parameter.empty and name not in arrays | keywords:
            keywords[name] = None  # an offset that the case is without

    gradients = backward(xp.asarray(grad_y.astype(dtype)), **arrays, **keywords)
    got = {"y": forward(**arrays, **keywords)}
    got |= {name: getattr(gradients, name) for name in expected if name != "y"}
    for name, want in expected.items():
        have = got[name] if xp is np else xp.asnumpy(got[name])
        assert have.shape == want.shape and have.dtype == dtype
        bound = BOUNDS[dtype]
        if any(note.startswith(f"grad_{name}:") and "1e-5" in note for note in case["notes"]):
            bound = FINITE_DIFFERENCES
        scale = max(np.abs(want).max(initial=0), 1e-30)
        error = np.abs(have - want).max(initial=0)
        assert error <= bound * scale, f"{name}: error {error:.1e}, scale {scale:.1e}"
