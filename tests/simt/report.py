"""``python -m tests.simt.report``: what every kernel takes on every GPU, as one table.

Rows are the kernels in each variant that the tests have launched on this machine (run them first),
compiled from the sources as they are now. A register spill makes the exit status 1. Shared memory
is in bytes, the most that a block was launched with.

``/elem`` are instructions for each element, of kernels whose loads are 16 bytes: those of one round
of the inner loop, which ``sass.py`` finds in the machine code, by the elements that a thread makes
in it. An element is one channel of what is looped over: for a convolution one (position, tap,
channel) value of its columns, for an image gradient one (pixel, sample, channel), for RoIs one
(bin, pixel, channel). How many there are follows from the loads in the loop, as ``loads`` tells.
What happens in some of the rounds only is left out: plans of samples, and with TERMS=3 the
promotion of the sums in every fourth step, which adds 1.9 per element to ``fused_conv`` and 2 each
time to ``column_gradient``. They never run on sm_75, where their tensor cores are traps.

The inner loop of ``column_gradient`` goes through the output channels, 64 bytes of them in a round,
and what follows uses the sums: its figure is that of a whole tile of columns, of OUT_CHANNELS. It
has none where the assembler lays the way to the inner loop backwards.
"""

import contextlib
import json
import sys

from tests.simt import nvrtc
from tests.simt.build import CACHE, HERE

KERNELS = HERE.parents[1] / "deformable" / "cuda"
LAUNCHED = CACHE / "launched.json"
OUT_CHANNELS = 256
BYTES = {"__half": 2, "__nv_bfloat16": 2, "float": 4, "double": 8}


def remember(modules):
    """Keep the variants of the library's own kernels, and their largest dynamic shared memory."""
    known = _remembered()
    for module in modules:
        if module.file != "kernel.cu":
            shared = known.setdefault((module.file, module.options), {})
            for kernel, (_, size) in module.launched.items():
                shared[kernel] = max(size, shared.get(kernel, 0))
    CACHE.mkdir(parents=True, exist_ok=True)
    LAUNCHED.write_text(json.dumps([[*variant, known[variant]] for variant in sorted(known)]))


def _remembered():
    """{(file, options): {kernel: bytes of dynamic shared memory}}, of files that still exist."""
    with contextlib.suppress(FileNotFoundError):
        return {
            (file, tuple(options)): shared
            for file, options, shared in json.loads(LAUNCHED.read_text())
            if (KERNELS / file).exists()
        }
    return {}


def loads(file, kernel, macros):
    """Loads of 16 bytes in the inner loop for 16 bytes of elements; 0 where there are none."""
    match file, kernel:
        case "fused_conv.cu", "fused_conv":
            return int(macros["CORNERS"])
        case "fused_weight_gradient.cu", "weight_gradient":
            copied = int(macros["TILE_O"]) * BYTES[macros["DTYPE"]] / 256
            return int(macros["CORNERS"]) + max(1, copied)
        case "fused_depthwise.cu", _:
            return int(macros["CORNERS"]) + 1  # the weights, or the gradient of the position
        case ("deform_conv.cu", "im2col") | ("roi_align.cu", "maximum"):
            return 4
        case "deform_conv.cu", "offset_gradient":
            return 5  # four corners and the gradient of the columns
        case "roi_pool.cu", "winner_gradient":
            return 0  # it skips nearly all that it loads
    return 1


def per_element(file, kernel, options, resources):
    """Instructions for each element, or None if no loop with loads of 16 bytes was found."""
    macros = dict(option.removeprefix("-D").split("=") for option in options)
    elements = 16 // BYTES[macros["DTYPE"]]
    if kernel == "column_gradient":
        rounds = OUT_CHANNELS // (4 * elements)
        tile = resources.around and resources.around + (rounds - 1) * resources.inner
        cost = tile / int(macros["TILE_N"])
    else:
        cost = resources.per_load * loads(file, kernel, macros) / elements
    return cost if cost and int(macros["VEC"]) == elements else None


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


def table(rows, dynamic_shared):
    """The lines of the table: a column per architecture, a paragraph per variant."""
    yield f"{'':24}" + "".join(f"{f'sm_{name}':>28}" for name in nvrtc.architectures())
    yield f"{'':24}" + f"{'regs instr shared /elem':>28}" * len(nvrtc.architectures())
    variant = None
    for file, kernel, options, on in rows:
        if variant != (file, options):
            variant = file, options
            yield f"\n{file}: {' '.join(option.removeprefix('-D') for option in options)}"
        shared = dynamic_shared.get(variant, {}).get(kernel, 0)
        line = f"  {kernel:<22}"
        for found in on.values():
            cost = per_element(file, kernel, options, found)
            line += f"{found.registers:>9}{found.instructions:>6}{found.shared + shared:>7}"
            line += f"{'-' if cost is None else format(cost, '.1f'):>6}"
        yield line


def main():
    variants = _remembered()
    if not nvrtc.available() or not variants:
        sys.exit("needs NVRTC, and variants: run the tests first")
    wrong = []
    found = list(rows(variants, wrong))
    wrong += problems(found)
    print("\n".join(table(found, variants)), flush=True)
    sys.exit("\n".join(["", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
