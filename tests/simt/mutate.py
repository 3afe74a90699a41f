"""``python -m tests.simt.mutate FILE [pytest arguments]``: do the tests notice a changed kernel?

Changes one token of a kernel file after the other and runs the tests given (by default those of the
file's own module) until the first failure. Prints the mutants that no test noticed. A mutant that
does not compile does not count. Examples:

    python -m tests.simt.mutate deformable/cuda/conv.cu
    python -m tests.simt.mutate deformable/cuda/conv.cu --sample 50 tests/test_conv.py -k cupy
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import sys
import tempfile

import pytest

from tests.simt import build, nvrtc, source
from tests.simt.module import RawModule
from tests.simt.settings import settings

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
# Limits of registers and sizes of arrays: larger ones do no harm.
SIZES = re.compile(r"__launch_bounds__|\bBLOCKS =|^\s*[\w ]+ \w+(\[\w+\])+;")
QUICKLY_BUILT = ("-O0", "-g0", "-w")
SURVIVED, KILLED, NOT_COMPILED, ERROR = 0, 1, 77, 2


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


class MutantLoop:
    """A pytest plugin that runs the collected tests on one mutant after the other, not once.

    Each mutant gets a child process, which stops at the first failure. Tests that have killed
    many mutants come first.
    """

    def __init__(self, chosen, jobs, out):
        self.waiting, self.jobs, self.out = list(reversed(chosen)), jobs, out
        self.running = {}  # by process: mutant, its cache, where the test that killed it is written
        self.counts, self.kills = collections.Counter(), collections.Counter()

    def pytest_runtestloop(self, session):
        self.items = session.items
        self.start(None, 3600)
        if self.wait()[1] != SURVIVED:
            return True
        seconds = int(60 + 5 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.jobs:
                self.start(self.waiting.pop(), seconds)
            mutant, status = self.wait()
            if status not in (KILLED, NOT_COMPILED):
                name = "survived" if status == SURVIVED else "error"
                print(f"{name}: {mutant}", file=self.out, flush=True)
        return True

    def start(self, mutant, seconds):
        """Judge a mutant in a child process, which may compute for so long."""
        cache = pathlib.Path(tempfile.mkdtemp())
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            status = ERROR
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                _silence()
                status = self.judge(mutant, cache, writing)
            finally:
                os._exit(status)
        os.close(writing)
        self.running[child] = mutant, cache, reading

    def judge(self, mutant, cache, killer):
        """In a child process: run the tests until one fails."""
        compiled = _install(mutant, cache) if mutant else lambda: True
        self.items.sort(key=lambda item: -self.kills[item.nodeid])
        for item, following in zip(self.items, [*self.items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if item.session.testsfailed:
                os.write(killer, item.nodeid.encode())
                return KILLED if compiled() else NOT_COMPILED
        return SURVIVED

    def wait(self):
        """The next mutant that is judged, and how."""
        child, status = os.wait()
        mutant, cache, reading = self.running.pop(child)
        shutil.rmtree(cache)
        with open(reading) as killer:
            self.kills[killer.read()] += 1  # "" if no test did
        status = os.waitstatus_to_exitcode(status)
        status = KILLED if status < 0 else status  # by a signal: it crashed, or took too long
        self.counts[status] += bool(mutant)
        return mutant, status


def _install(mutant, cache):
    """Change what is built from now on; a function that says whether all of that compiled."""
    shared, errors = build.CACHE, []

    def rewrite(code):
        changed = mutant.apply(code)
        build.CACHE = shared if changed == code else cache  # modules are built when they are made
        return changed

    class Watched(build.BuildError):
        def __init__(self, *text):
            errors.append(text)
            super().__init__(*text)

    build.BuildError = Watched
    RawModule.rewrite = staticmethod(rewrite)
    return lambda: not errors


def _silence():
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--sample", type=int, help="so many mutants, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only those of these lines of the file: 12,34")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options, arguments = parser.parse_known_args()
    arguments = arguments or [f"tests/test_{options.file.stem}.py", "-k", "cupy"]

    chosen = mutants(options.file)
    if options.lines:
        lines = {int(line) for line in options.lines.split(",")}
        chosen = [mutant for mutant in chosen if mutant.line in lines]
    if options.sample and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    nvrtc.available = lambda: False
    build.KERNEL += QUICKLY_BUILT
    build.available() and build.runtime()  # here, and so in no child
    build._precompiled((*build.KERNEL, f"-D__CUDA_ARCH__={settings.compute_capability}0"))

    with os.fdopen(os.dup(1), "w") as out:
        _silence()
        loop = MutantLoop(chosen, options.jobs, out)
        pytest.main([*arguments, "-q", "-p", "no:cacheprovider"], plugins=[loop])
        if not loop.counts.total():
            print("the tests fail, or there are none, before anything is changed", file=out)
            sys.exit(1)
        killed, survived = loop.counts[KILLED], loop.counts[SURVIVED]
        share = 100 * killed / max(killed + survived, 1)
        print(f"{options.file}: {killed} of {killed + survived} killed ({share:.1f} %)", file=out)
        print(f"not compiled: {loop.counts[NOT_COMPILED]}, errors: {loop.counts[ERROR]}", file=out)


if __name__ == "__main__":
    main()
