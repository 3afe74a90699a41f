"""The README's code runs, and its commands name what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_code_blocks_run_and_print(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_code_blocks_and_two_commands():
    assert len(BLOCKS) >= 2
    for mark in ("train", "tests"):
        (command,) = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)\n```", README, re.S)
        assert "\n" not in command, "one command each"
        for path in re.findall(r"(?:examples|tests)/\S+", command):
            assert (ROOT / path).exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
