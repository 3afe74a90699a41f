"""examples/register_images.py finds the warp, on both libraries."""

import numpy as np
import pytest
from matplotlib.image import imsave
from numpy.testing import assert_allclose

from tests.arrays import host
from tests.examples import example


@pytest.fixture
def script(monkeypatch):
    """The example with images of 24 x 24 pixels."""
    script = example("register_images")
    monkeypatch.setattr(script, "SIDE", 24)
    monkeypatch.setattr(script, "LARGEST", 1.0)
    return script


def test_the_offsets_are_right_within_a_twentieth_of_a_pixel(tmp_path, capsys):
    example("register_images").main(["--quick", "--out", str(tmp_path)])
    before, after = (line.split() for line in capsys.readouterr().out.splitlines()[2:4])
    assert before[:3] == ["before:", "no", "offsets"]
    assert float(before[3]) > 1
    assert after[0] == "after"
    assert float(after[1]) < 0.05
    assert (tmp_path / "register-images-0.png").read_bytes().startswith(b"\x89PNG")


def test_registration_runs_on_a_gpu(script, xp):
    rng = np.random.default_rng(0)
    image, flow = script.photograph(), script.smooth_flow(rng)
    warped = script.deform_conv2d(image, flow, np.ones((1, 1, 1, 1), np.float32))
    offset, losses = script.register(*map(xp.asarray, (image, warped)), 20, xp)
    assert isinstance(offset, xp.ndarray)
    assert losses[-1] < 0.3 * losses[0]
    assert np.abs(host(xp, offset) - flow).mean() < 0.7 * np.abs(flow).mean()


def test_smoothing_keeps_what_is_constant_and_spreads_what_is_not(script):
    maps = np.zeros((1, 2, 24, 24))
    maps[0, 0] = 3
    maps[0, 1, 12, 12] = 1
    constant, blob = script.smooth(maps, 2.0, np)[0]
    assert_allclose(constant, 3)
    y = np.arange(24)[:, None]
    assert_allclose((blob * (y - 12) ** 2).sum(), 4, rtol=1e-2)
    assert_allclose(blob, blob.T, atol=1e-12)


def test_the_flow_is_as_large_as_said(script):
    flow = script.smooth_flow(np.random.default_rng(0))
    assert_allclose(np.linalg.norm(flow, axis=1).max(), 1.0, rtol=1e-6)
    assert np.abs(np.diff(flow, axis=2)).max() < 0.2


@pytest.mark.parametrize("colours", [(), (3,), (4,)])
def test_the_photograph_is_the_middle_of_the_file(colours, script, tmp_path):
    pixels = np.random.default_rng(0).random((30, 41, *colours)).astype(np.float32)
    imsave(tmp_path / "own.png", pixels, cmap="gray", vmin=0, vmax=1)
    picture = script.photograph(tmp_path / "own.png")
    assert picture.shape == (1, 1, 24, 24)
    grey = pixels if not colours else pixels[..., :3].mean(axis=2)
    expected = grey[3:27, 8:32]
    expected = (expected - expected.mean()) / expected.std()
    levels = 2 / 255 / grey[3:27, 8:32].std()  # a file has 256
    assert np.abs(picture[0, 0] - expected).max() <= levels
    assert abs(picture.mean()) <= 1e-6


def test_a_photograph_that_is_too_small_is_refused(script, tmp_path):
    imsave(tmp_path / "own.png", np.zeros((23, 30)))
    with pytest.raises(SystemExit, match=r"\(23, 30\) pixels, 24 x 24 are needed"):
        script.main(["--image", str(tmp_path / "own.png"), "--out", str(tmp_path)])
