"""Compiles kernels for every GPU with NVRTC, as CuPy does but without a driver.

NVRTC and its headers come from the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime, or from a
CUDA toolkit. It knows what g++ does not: CUDA's own rules, the instructions of each architecture,
and how many registers a kernel takes. Warnings are errors.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import re
import sys

from tests.simt import sass
from tests.simt.build import CACHE

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
OPTIONS = (  # CuPy's, and a report of the assembler
    "--std=c++17",
    "-ftz=true",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
)

ROOTS = [f"{path}/nvidia/*" for path in sys.path] + ["/usr/local/cuda*"]


class CompileError(RuntimeError):
    """What NVRTC or its assembler says of a source text."""


@dataclasses.dataclass
class Resources:
    """What one kernel takes on one architecture."""

    registers: int
    spilled: int  # bytes of registers that did not fit, stored and loaded again
    stack: int  # bytes of local memory: arrays with an index that is not constant
    shared: int  # bytes, without dynamic shared memory
    instructions: int  # of machine code
    per_load: float  # instructions of the inner loop for each load of 16 bytes, see sass.py; or 0
    inner: int  # instructions of a round of the inner loop; or 0
    around: int  # instructions of a round of the loop around it; or 0


@functools.cache
def _library():
    """NVRTC and the folder of CUDA's headers, or None."""
    for root in ROOTS:
        libraries = glob.glob(f"{root}/lib*/libnvrtc.so.*[0-9]")
        headers = glob.glob(f"{root}/include/cuda_fp16.h")
        headers += glob.glob(f"{os.path.dirname(root)}/cuda_runtime/include/cuda_fp16.h")
        if libraries and headers:
            return ctypes.CDLL(libraries[0]), os.path.dirname(headers[0])
    return None


def available():
    return _library() is not None


@functools.cache
def architectures():
    """Those of ARCHITECTURES that this NVRTC knows."""
    library, _ = _library()
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(known)
    return tuple(architecture for architecture in ARCHITECTURES if architecture in [*known])


class Background:
    """Compiles in other processes, while the tests run."""

    def __init__(self):
        self._pool = None
        self._jobs = {}

    def watch(self, module):
        """Compile a module of the library (and not of the simulator's own tests)."""
        if available() and module.file != "kernel.cu":
            self.submit(module.code, module.options)

    def submit(self, code, options):
        """Compile this source text for all architectures."""
        for architecture in architectures():
            job = (code, options, architecture)
            if job not in self._jobs and not os.path.exists(_cache_file(*job)):
                self._jobs[job] = self._workers().submit(resources, *job)

    def wait(self, code, options):
        """{architecture: resources of each kernel} of what has been submitted."""
        answer = {}
        for architecture in architectures():
            job = self._jobs.get((code, options, architecture))
            answer[architecture] = job.result() if job else resources(code, options, architecture)
        return answer

    def close(self):
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _workers(self):
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                os.cpu_count(), multiprocessing.get_context("spawn"), os.nice, (5,)
            )
        return self._pool


def resources(code, options, architecture):
    """The resources of each kernel of a source text, by name; from the cache if it has them."""
    cached = _cache_file(code, options, architecture)
    if not os.path.exists(cached):
        answer = {
            k: dataclasses.asdict(r) for k, r in _compile(code, options, architecture).items()
        }
        os.makedirs(CACHE, exist_ok=True)
        with open(f"{cached}.{os.getpid()}", "w") as file:
            json.dump(answer, file)
        os.replace(file.name, cached)
    with open(cached) as file:
        return {kernel: Resources(**values) for kernel, values in json.load(file).items()}


def _cache_file(code, options, architecture):
    library, headers = _library()
    texts = (library._name, headers, __doc__, sass.__doc__)
    key = json.dumps([code, options, architecture, OPTIONS, *texts])
    return f"{CACHE}/nvrtc-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _compile(code, options, architecture):
    library, headers = _library()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    try:
        options = (*options, *OPTIONS, f"-arch=sm_{architecture}", f"-I{headers}")
        texts = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        failed = library.nvrtcCompileProgram(program, len(options), texts)
        log = _get(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
        log = log.rstrip(b"\0").decode()
        if failed or re.search(r"\bwarning\b", log):
            raise CompileError(f"sm_{architecture}: {log}")
        binary = _get(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return _read_log(log, sass.kernels(binary, architecture))


def _get(get_size, get, program):
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    return text.raw


def _read_log(log, kernels):
    """The assembler tells of one kernel after the other."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.partition("'")[0]

        def number(pattern, part=part):
            match = re.search(rf"(\d+) {pattern}", part)
            return int(match[1]) if match else 0

        inner, around = sass.inner_loops(kernels[name])
        found[name] = Resources(
            registers=number("registers"),
            spilled=number("bytes spill stores") + number("bytes spill loads"),
            stack=number("bytes stack frame"),
            shared=number("bytes smem"),
            instructions=sass.count(kernels[name]),
            per_load=inner.instructions / inner.loads if inner else 0,
            inner=inner.instructions if inner else 0,
            around=around.instructions if around else 0,
        )
    return found
