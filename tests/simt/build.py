"""Builds the simulator's runtime and kernel libraries with g++, each once: a cache keeps them."""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(
    os.environ.get("SIMT_CACHE", pathlib.Path(tempfile.gettempdir()) / f"simt-{os.getuid()}")
)
OLDEST_GCC = 12  # has _Float16 in C++

COMMON = ("-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wno-sign-compare")
RUNTIME = (*COMMON, "-O3", "-fvisibility=default", "-fno-semantic-interposition")
KERNEL = (
    *COMMON,
    *("-O1", "-gdwarf-4", "-g1", "-ffp-contract=off", "-fno-strict-aliasing"),
    # every variable of a kernel library is its own, not shared with those of equal names elsewhere
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-threadsafe-statics"),
    # the compiler announces accesses, doubtful operations and basic blocks: see runtime/hooks.h
    *("-fsanitize=thread,undefined,float-cast-overflow", "-fsanitize-coverage=trace-pc"),
    "-fsanitize=bounds-strict",  # also of an array at the end of a struct
    # what is no mistake in CUDA, or does not exist there
    "-fno-sanitize=float-divide-by-zero,vptr,unreachable,builtin",
    "-fno-sanitize=nonnull-attribute,returns-nonnull-attribute",
    "-Werror=vla",
    "-ftrivial-auto-var-init=pattern",  # what a kernel forgets to initialise is the same garbage
    *("-Wno-unknown-pragmas", "-Wno-unused", "-Wno-attributes"),
)
INCLUDE = f"-I{HERE}"
# Copies of the project share the cache: a library may tell of the dialect in another's folder.
NOT_A_KERNEL = re.compile(r"\?\?|.*/(dialect|runtime)/")
# Without crtbegin.o the .bss of the library is its shared memory and nothing else.
LINK = ("-shared", "-nostartfiles")


class SimtError(RuntimeError):
    """What a kernel, its launch or its source text did wrong."""


class BuildError(SimtError):
    """What g++ says of a kernel."""


@functools.cache
def available():
    """Whether this machine can build kernels."""
    if shutil.which("g++") is None:
        return False
    answer = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout
    return int(re.match(r"\d*", answer)[0] or 0) >= OLDEST_GCC


@functools.cache
def runtime():
    """The loaded runtime; kernel libraries find its functions when they are loaded after it."""
    text = '#include "runtime/runtime.cpp"\n'
    library = ctypes.CDLL(
        str(_build("runtime", text, RUNTIME, ("-shared",))), mode=ctypes.RTLD_GLOBAL
    )
    library.simt_launch.restype = ctypes.c_char_p
    library.simt_error_address.restype = ctypes.c_void_p
    return library


def kernel_library(text, compute_capability):
    """Path of the library of a kernel text, which is compiled behind the dialect's simt.h."""
    runtime()
    options = (*KERNEL, f"-D__CUDA_ARCH__={compute_capability}0")
    return _build("kernel", text, (*options, "-include", str(_precompiled(options))), LINK)


@functools.cache
def _precompiled(options):
    """A header that includes simt.h, precompiled: g++ finds its .gch beside it."""
    folder = CACHE / f"header-{_key(*options)}"
    header = folder / "header.h"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            text = '#include "dialect/simt.h"\n'
            source = pathlib.Path(fresh, "new", "header.h")
            source.parent.mkdir()
            source.write_text(text)
            _run(["g++", *options, INCLUDE, "-x", "c++-header", str(source), "-o", f"{source}.gch"])
            with contextlib.suppress(OSError):  # another process was faster
                source.parent.rename(folder)
    return header


def place(library, offset):
    """'file:line' of a kernel's own code (not the dialect's) at an offset in its library."""
    command = ["addr2line", "-i", "-e", str(library), hex(offset)]
    frames = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    own = [frame for frame in frames if frame and not NOT_A_KERNEL.match(frame)]
    return pathlib.Path(own[0].split()[0]).name if own else None


@functools.cache
def _own_hash():
    """Of the simulator's C++."""
    files = sorted((HERE / "dialect").iterdir()) + sorted((HERE / "runtime").iterdir())
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _key(*texts):
    return hashlib.sha256("\0".join((*texts, _own_hash())).encode()).hexdigest()[:24]


def _build(name, text, compile_options, link_options):
    library = CACHE / f"{name}-{_key(text, *compile_options, *link_options)}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            source, compiled, linked = (f"{folder}/{name}.{end}" for end in ("cpp", "o", "so"))
            pathlib.Path(source).write_text(text)
            _run(["g++", *compile_options, INCLUDE, "-c", source, "-o", compiled])
            _run(["g++", compiled, *link_options, "-o", linked])
            os.replace(linked, library)
    return library


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(result.stderr[:6000])
