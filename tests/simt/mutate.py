"""``python -m tests.simt.mutate FILE [pytest arguments]``: do the tests notice a changed kernel?

Changes one token of a kernel file after the other and runs the tests given (by default those of the
file's own module) until the first failure. Prints the mutants that no test noticed. A mutant that
does not compile does not count. Examples:

    python -m tests.simt.mutate deformable/cuda/conv.cu
    python -m tests.simt.mutate deformable/cuda/conv.cu --sample 50 tests/test_conv.py -k cupy
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

import pytest

from tests.simt import build, nvrtc, source
from tests.simt.module import RawModule

SWAPS = [
    *((" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" == ", " != ")),
    *((" != ", " == "), (" && ", " || "), (" || ", " && "), (" + ", " - "), (" - ", " + ")),
    *((" * ", " + "), (" / ", " * "), (" % ", " / "), (" += ", " = "), (" -= ", " += ")),
    *((" << ", " >> "), (" >> ", " << "), (" & ", " | "), (" | ", " & "), (" ? ", " != 0 ? ")),
]
PATTERNS = [
    *((re.escape(old), new) for old, new in SWAPS[:-1]),
    (r"(?<![\w.])0(?![\w.])", "1"),
    (r"(?<![\w.])1(?![\w.])", "0"),
    (r"(?<![\w.])1(?![\w.])", "2"),
    (r"(?<![\w.])([2-9]|[1-9]\d+)(?![\w.])", lambda match: str(int(match[0]) + 1)),
    (r"(?<=\.)x\b", "y"),
    (r"(?<=\.)y\b", "x"),
    (r"(?<=_)h\b", "w"),
    (r"(?<=_)w\b", "h"),
    (r"(?<=_)y\b", "x"),
    (r"(?<=_)x\b", "y"),
    (r"\bheight\b", "width"),
    (r"\bwidth\b", "height"),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\bfloor\(", "ceil("),
    (r"\bceil\(", "floor("),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"!(?=\w)", ""),
    (r"\bcontinue;", "break;"),
    (r"\bif \(", "if (!("),
    (r"__sync(threads|warp)\(\);", ";"),
    (r"cp_async_wait<\d>\(\);", ";"),
    (r"\breturn;", ";"),
    (r"\batomicAdd\(([^,;]+), ([^;]+)\);", r"*(\1) += \2;"),
]
NO_CODE = re.compile(r"\s*(//|#|template\b|struct\b|static_assert|typedef\b|\}|$)")
SIZES = re.compile(r"__launch_bounds__|^\s*[\w ]+ \w+(\[\w+\])+;")  # larger ones do no harm
QUICKLY_BUILT = ("-O0", "-g0", "-w")
SURVIVED, KILLED, NOT_COMPILED = 0, 1, 77


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one line of a file."""

    file: str
    line: int
    old: str
    new: str

    def __str__(self):
        return f"{self.file}:{self.line}\n  - {self.old.strip()}\n  + {self.new.strip()}"

    def apply(self, code):
        """A source text, into which the file is spliced, with the change."""
        lines = code.split("\n")
        places = [
            number
            for number, (file, line, text) in enumerate(_numbered(code))
            if (file, line) == (self.file, self.line) and text == self.old
        ]
        for number in places:
            lines[number] = self.new
        return "\n".join(lines)


def _numbered(code):
    """As source.lines, but with the #line directives, so that positions are those of the text."""
    known = iter(source.lines(code))
    for text in code.split("\n"):
        yield (None, 0, text) if text.lstrip().startswith("#line ") else next(known)


def mutants(path):
    """All mutants of a file."""
    found = {}
    for number, text in enumerate(pathlib.Path(path).read_text().split("\n"), 1):
        if NO_CODE.match(text) or SIZES.search(text):
            continue
        end = text.find("//") if "//" in text else len(text)
        for pattern, new in PATTERNS:
            for match in re.finditer(pattern, text[:end]):
                replaced = new(match) if callable(new) else match.expand(new)
                changed = text[: match.start()] + replaced + text[match.end() :]
                if replaced == "if (!(":
                    changed = _close(changed, match.start() + len(replaced))
                if changed and changed != text:
                    found[Mutant(pathlib.Path(path).name, number, text, changed)] = None
    return list(found)


def _close(text, start):
    """The text with a second ) behind the condition that begins at start; "" if it goes on."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return f"{text[:i]}){text[i:]}"
    return ""


def run(mutant, arguments, timeout):
    """Run the tests on a mutant (or, for None, as they are) in a child process; its exit status."""
    child = os.fork()
    if not child:
        signal.alarm(timeout)
        with tempfile.TemporaryDirectory() as cache, _silence():
            status = _run_here(mutant, arguments, pathlib.Path(cache))
        os._exit(status)
    return child


def _run_here(mutant, arguments, cache):
    compiled = True

    class Watched(build.BuildError):
        def __init__(self, *text):
            nonlocal compiled
            compiled = False
            super().__init__(*text)

    if mutant:
        for built in build.CACHE.iterdir():  # what the change does not touch is not built again
            (cache / built.name).symlink_to(built)
        build.CACHE, build.BuildError = cache, Watched
        RawModule.rewrite = staticmethod(mutant.apply)
    status = int(pytest.main([*arguments, "-x", "-q", "-p", "no:cacheprovider"]))
    if status not in (SURVIVED, KILLED):
        return 2
    return status if compiled else NOT_COMPILED


@contextlib.contextmanager
def _silence():
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
        yield


def results(chosen, arguments, timeout, jobs):
    """(mutant, status) of each mutant as it is known; a status below 0 is a signal."""
    running, waiting = {}, list(reversed(chosen))
    while running or waiting:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[run(mutant, arguments, timeout)] = mutant
        child, status = os.wait()
        yield running.pop(child), os.waitstatus_to_exitcode(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--sample", type=int, help="so many mutants, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options, arguments = parser.parse_known_args()
    arguments = arguments or [f"tests/test_{options.file.stem}.py", "-k", "cupy"]

    chosen = mutants(options.file)
    if options.sample and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    with _kept_output(), _silence():
        pytest.main([*arguments, "--collect-only", "-q"])  # imports what every child needs
    nvrtc.available = lambda: False
    build.KERNEL += QUICKLY_BUILT

    start = time.monotonic()
    _, status = os.waitpid(run(None, arguments, 3600), 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit("the tests fail, or there are none, before anything is changed")
    timeout = int(60 + 5 * (time.monotonic() - start))

    counts = collections.Counter()
    for mutant, status in results(chosen, arguments, timeout, options.jobs):
        name = {SURVIVED: "survived", KILLED: "killed", NOT_COMPILED: "not compiled"}
        kind = name.get(status, "killed" if status < 0 else "error")
        counts[kind] += 1
        if kind in ("survived", "error"):
            print(f"{kind}: {mutant}", flush=True)
    judged = counts["killed"] + counts["survived"]
    share = 100 * counts["killed"] / max(judged, 1)
    print(
        f"{options.file}: {counts['killed']} of {judged} mutants killed ({share:.1f} %), {counts}"
    )


@contextlib.contextmanager
def _kept_output():
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


if __name__ == "__main__":
    main()
