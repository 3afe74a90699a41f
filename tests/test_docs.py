"""The pages in docs: their code runs, and nothing public is missing."""

import doctest
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deformable
from deformable import nn, testing, visualize

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
WITH_CODE = [page for page in PAGES if ">>>" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_gives_what_the_page_says(page):
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_has_code_that_is_not_run(page):
    assert set(re.findall(r"code(?:-block)?:: *(\S*)", page.read_text())) <= {"text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_what_is_there(page):
    text = page.read_text()
    named = [DOCS / image for image in re.findall(r"image:: (\S+)", text)]
    named += [DOCS.parent / path for path in re.findall(r"``((?:examples|tests)/\S+?)``", text)]
    named += [DOCS.parent / "deformable/cuda" / name for name in re.findall(r"``(\w+\.cu)``", text)]
    assert all(path.exists() for path in named), named


def test_the_reference_lists_everything_public():
    listed = set(re.findall(r"^   ([\w.]+)$", (DOCS / "api.rst").read_text(), re.M))
    public = {*deformable.__all__, *nn.__all__} - {"distributed"}
    for module in testing, visualize:
        public |= {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
        }
    assert public <= listed
    assert {name for name in listed if "." not in name} <= public


def test_pictures_are_drawn(tmp_path):
    pictures = runpy.run_path(str(DOCS / "pictures.py"))
    for name, draw in pictures["PICTURES"].items():
        draw().savefig(tmp_path / f"{name}.png", dpi=20)
        assert (DOCS / "images" / f"{name}.png").exists()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("numpydoc")
    source = tmp_path / "docs"  # the reference writes its pages beside the others
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("generated"))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", source, tmp_path / "site"]
    built = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/generated/deformable.deform_conv2d.html").exists()
