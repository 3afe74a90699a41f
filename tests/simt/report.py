"""``python -m tests.simt.report``: what every kernel takes on every GPU, as one table.

Rows are the kernels in each variant that the tests have launched on this machine (run them first),
compiled from the sources as they are now. A register spill makes the exit status 1.
"""

import contextlib
import json
import sys

from tests.simt import nvrtc
from tests.simt.build import CACHE

VARIANTS = CACHE / "variants.json"


def remember(modules):
    """Keep the variants of the library's own kernels: pairs of a file and its options."""
    known = {(file, tuple(options)) for file, options in _remembered()}
    known |= {(module.file, module.options) for module in modules if module.file != "kernel.cu"}
    CACHE.mkdir(parents=True, exist_ok=True)
    VARIANTS.write_text(json.dumps(sorted(known)))


def _remembered():
    with contextlib.suppress(FileNotFoundError):
        return json.loads(VARIANTS.read_text())
    return []


def rows(variants, broken):
    """(file, kernel, options, {architecture: resources}) of each kernel of each variant.

    To ``broken`` goes a line for each variant that does not compile: it is an error, or the tests
    no longer launch it since the file has changed.
    """
    from deformable import _cuda

    background = nvrtc.Background()
    sources = {file: _cuda.source(file) for file, _ in variants}
    for file, options in variants:
        background.submit(sources[file], tuple(options))
    for file, options in variants:
        try:
            on = background.wait(sources[file], tuple(options))
        except nvrtc.CompileError as error:
            broken.append(f"{file} {' '.join(options)}: {str(error).partition(chr(10))[0]}")
            continue
        for kernel in on[nvrtc.architectures()[0]]:
            yield file, kernel, options, {name: found[kernel] for name, found in on.items()}
    background.close()


def problems(rows):
    """One line for each kernel that spills registers."""
    return [
        f"{file} {kernel} {' '.join(options)} on sm_{name}: {found.spilled} bytes spilled"
        for file, kernel, options, on in rows
        for name, found in on.items()
        if found.spilled
    ]


def table(rows):
    """The lines of the table: a column per architecture, a paragraph per variant."""
    yield f"{'':24}" + "".join(f"{f'sm_{name}':>21}" for name in nvrtc.architectures())
    yield f"{'':24}" + f"{'regs instr shared':>21}" * len(nvrtc.architectures())
    variant = None
    for file, kernel, options, on in rows:
        if variant != (file, options):
            variant = file, options
            yield f"\n{file}: {' '.join(option.removeprefix('-D') for option in options)}"
        yield f"  {kernel:<22}" + "".join(
            f"{found.registers:>9}{found.instructions:>6}{found.shared:>6}" for found in on.values()
        )


def main():
    variants = _remembered()
    if not nvrtc.available() or not variants:
        sys.exit("needs NVRTC, and variants: run the tests first")
    wrong = []
    found = list(rows(variants, wrong))
    wrong += problems(found)
    print("\n".join(table(found)), flush=True)
    sys.exit("\n".join(["", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
