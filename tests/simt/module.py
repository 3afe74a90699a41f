"""RawModule and its kernels: CUDA source built with g++, launched in the simulator, checked.

The interface is CuPy's. A kernel argument that points to memory is an object with ``data.ptr``,
``dtype``, ``shape`` and ``strides`` (fakecupy's arrays).
"""

import ctypes
import dataclasses
import functools
import threading
from typing import ClassVar

import numpy as np

from tests.simt import build, source
from tests.simt.build import SimtError
from tests.simt.settings import ORDERS, settings

TEXT = """{defines}#line 1 "kernel.cu"
{code}
#line 1 "footer"
extern "C" {{
extern __attribute__((visibility("hidden"))) char __ehdr_start, __bss_start, _end;
__attribute__((visibility("default"))) SIMT_RAW void simt_image(char** p) {{
  p[0] = &__ehdr_start;
  p[1] = &__bss_start;
  p[2] = &_end;
}}
}}
{structs}
extern "C" {{
extern __attribute__((visibility("default"))) const SimtKernel simt_kernels[];
const SimtKernel simt_kernels[] = {{{kernels}}};
}}
"""

SHARED_LIMIT = 227 << 10
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)


class _Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("grain", ctypes.c_int),
        ("writable", ctypes.c_bool),
        ("shared", ctypes.c_bool),
        ("internal", ctypes.c_bool),
        ("history", ctypes.c_void_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("check_races", ctypes.c_int),
        ("first_block", ctypes.c_size_t),
        ("code", ctypes.c_void_p),
        ("code_size", ctypes.c_size_t),
        ("steps", ctypes.c_size_t),
    ]


class _Member(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int), ("dtype", ctypes.c_char_p)]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_char_p),
        ("size", ctypes.c_int),
        ("pointer", ctypes.c_char),
        ("members", ctypes.POINTER(_Member)),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("max_threads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("call", ctypes.c_void_p),
    ]


@dataclasses.dataclass
class Parameter:
    """What a kernel takes: a value of ``dtype``, or a pointer to it."""

    name: str
    dtype: str  # NumPy's letter and size, "bf2" for bfloat16, "V" for a struct, "" for void
    size: int
    pointer: str  # "" for a value, "r" for a pointer to const, "w" for another
    members: list  # of a struct: (name, offset, dtype)

    def __str__(self):
        kind = self.dtype if self.dtype != "V" else f"a struct of {self.size} bytes"
        return f"a pointer to {kind or 'anything'}" if self.pointer else kind


class RawModule:
    """The kernels of a CUDA source text, with cupy.RawModule's interface."""

    built: ClassVar[list] = []  # every module of this process
    watchers: ClassVar[list] = []  # called with each of them
    rewrite = staticmethod(lambda code: code)  # mutate.py changes kernels here

    def __init__(self, *, code, options=(), backend="nvrtc", name_expressions=None):
        if not isinstance(code, str) or not isinstance(options, tuple):
            raise TypeError("RawModule: code is a string, options a tuple of strings")
        if name_expressions is not None or backend != "nvrtc":
            raise NotImplementedError('kernels are extern "C", specialised by -D options')
        self.code, self.options = self.rewrite(code), options
        self.launched = {}  # kernel: most threads per block, most bytes of dynamic shared memory

    def get_function(self, name):
        if name not in self._kernels:
            raise SimtError(f"there is no kernel {name}")
        return Kernel(self, self.entries[name], self._kernels[name])

    @property
    def file(self):
        """The file that the source text comes from."""
        return next(source.lines(self.code))[0]

    @functools.cached_property
    def entries(self):
        return source.entries(self.code)

    @functools.cached_property
    def _kernels(self):
        RawModule.built.append(self)
        for watcher in RawModule.watchers:
            watcher(self)
        self.path = build.kernel_library(self._text(), settings.compute_capability)
        self.library = ctypes.CDLL(str(self.path))
        image = (ctypes.c_void_p * 3)()
        self.library.simt_image(image)
        self.start, self.bss, self.end = image
        table = (_Kernel * len(self.entries)).in_dll(self.library, "simt_kernels")
        return {kernel.name.decode(): kernel for kernel in table}

    def _text(self):
        """The kernels between the dialect and what tells Python of them."""
        defines = "".join(
            "#define {} {}\n".format(*f"{option[2:]}=1".split("=")[:2])
            for option in self.options
            if option.startswith("-D")
        )
        members = source.structs(self.code)
        by_value = {kind for entry in self.entries.values() for kind, _ in entry.parameters}
        structs = "\n".join(
            f"SIMT_STRUCT({struct}, {', '.join(f'SIMT_MEMBER({struct}, {m})' for m in names)})"
            for struct, names in members.items()
            if struct in by_value
        )
        kernels = ", ".join(
            f'SimtBinding<{name}>::describe("{name}", {entry.bounds or MAX_BLOCK[0]})'
            for name, entry in self.entries.items()
        )
        code = self.code.replace("#pragma once", "")  # of headers that are spliced in
        return TEXT.format(defines=defines, code=code, structs=structs, kernels=kernels)

    def regions(self):
        """Shared memory, which is all of the library's .bss, and its constants, all before it."""
        constants = _Region(self.start, self.bss - self.start, b"", 1, False, False, True)
        shared = (self.bss, self.end - self.bss, b"static shared memory", 2, True, True, False)
        return [constants, _Region(*shared)] if self.end > self.bss else [constants]

    def place(self, address):
        """' at file:line' of the kernel's own code that made a call."""
        if not address or not self.start <= address < self.bss:
            return ""
        place = build.place(self.path, address - self.start - 1)
        return f" at {place}" if place else ""


class Kernel:
    """One kernel of a module; calling it launches it, as with cupy.RawKernel."""

    _one_at_a_time = threading.Lock()

    def __init__(self, module, entry, description):
        self.module, self.name = module, entry.name
        self.max_threads_per_block = description.max_threads
        self._call = description.call
        # that of all kernels of the module, of which some may have more together than one may
        self._static_shared = module.end - module.bss
        self._max_dynamic_shared = max(0, (48 << 10) - self._static_shared)
        self.parameters = [
            Parameter(name, p.dtype.decode(), p.size, p.pointer.decode().strip("\0"), _members(p))
            for (_, name), p in zip(
                entry.parameters, description.parameters[: description.count], strict=True
            )
        ]

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._max_dynamic_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        room = SHARED_LIMIT - self._static_shared
        if not 0 <= size <= room:
            raise SimtError(f"{self.name}: {size} bytes of shared memory, there is room for {room}")
        self._max_dynamic_shared = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = self._dimensions(grid, block)
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise SimtError(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory, "
                f"the limit is {self.max_dynamic_shared_size_bytes}"
            )
        self._note_launch(block, shared_mem)
        cells, views = self._arguments(args)
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        parameters = (ctypes.addressof(pointers), ctypes.sizeof(pointers))
        regions = self._regions(views) + self.module.regions()
        regions.append(_Region(*parameters, b"", 1, False, False, True))
        launch = _Launch(
            call=self._call,
            arguments=pointers,
            grid=grid,
            block=block,
            dynamic_shared=shared_mem,
            regions=(_Region * len(regions))(*regions),
            region_count=len(regions),
            order=ORDERS.index(settings.order),
            seed=settings.seed,
            check_races=settings.races,
            first_block=max(0, grid[0] * grid[1] * grid[2] - settings.last_blocks)
            if settings.last_blocks
            else 0,
            code=self.module.start,
            code_size=self.module.bss - self.module.start,
            steps=settings.steps,
        )
        with self._one_at_a_time:
            error = build.runtime().simt_launch(ctypes.byref(launch))
            if error:
                place = self.module.place(build.runtime().simt_error_address())
                raise SimtError(f"{self.name}: {error.decode()}{place}")

    def _dimensions(self, grid, block):
        for name, sizes, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 3:
                raise TypeError(f"{self.name}: {name} is {sizes!r}, expected a tuple of 1 to 3")
            if any(int(size) < 1 for size in sizes):
                raise SimtError(f"{self.name}: {name} is {sizes}, no work must not be launched")
            if any(size > limit for size, limit in zip(sizes, limits, strict=False)):
                raise SimtError(f"{self.name}: {name} is {sizes}, the limits are {limits}")
        grid, block = ((*map(int, sizes), 1, 1)[:3] for sizes in (grid, block))
        threads = block[0] * block[1] * block[2]
        if threads > self.max_threads_per_block:
            limit = self.max_threads_per_block
            raise SimtError(f"{self.name}: {threads} threads per block, the limit is {limit}")
        return (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)

    def _note_launch(self, block, shared_mem):
        threads, shared = self.module.launched.get(self.name, (0, 0))
        threads = max(threads, block[0] * block[1] * block[2])
        self.module.launched[self.name] = threads, max(shared, shared_mem)

    def _arguments(self, args):
        """The bytes of each argument, and (first address, size, parameter, item size) of views."""
        if len(args) != len(self.parameters):
            given, expected = len(args), len(self.parameters)
            raise SimtError(f"{self.name}: {given} arguments for {expected} parameters")
        cells, views = [], []
        for argument, parameter in zip(args, self.parameters, strict=True):
            where = f"{self.name}: argument {parameter.name}"
            if not parameter.pointer:
                cells.append(_value(argument, parameter, where))
            elif argument is None:
                cells.append(ctypes.c_void_p(0))
            else:
                _check_array(argument, parameter, where)
                cells.append(ctypes.c_void_p(argument.data.ptr))
                views.append((*_extent(argument), parameter, argument.dtype.itemsize))
        return cells, views

    def _regions(self, views):
        """The memory of the arguments; views that overlap become one region."""
        regions = []
        for base, size, parameter, grain in sorted(views, key=lambda view: view[:2]):
            if not size:
                continue
            name, writable = parameter.name.encode(), parameter.pointer == "w"
            last = regions[-1] if regions else None
            if last is None or base >= last.base + last.size:
                regions.append(_Region(base, size, name, grain, writable, False, False))
                continue
            if last.writable != writable:
                names = f"{last.name.decode()} and {parameter.name}"
                raise SimtError(f"{self.name}: {names} overlap, and one of them is written")
            last.size = max(last.size, base + size - last.base)
            last.name += b"/" + name
            last.grain = min(last.grain, grain)
        return regions


def _members(parameter):
    members = []
    while parameter.members and parameter.members[len(members)].name:
        m = parameter.members[len(members)]
        members.append((m.name.decode(), m.offset, m.dtype.decode()))
    return members


@functools.cache
def _dtype_code(dtype):
    if dtype.names:
        return "V"
    return "bf2" if dtype.name == "bfloat16" else dtype.str[1:]


def _check_array(argument, parameter, where):
    if not hasattr(argument, "data") or not hasattr(argument.data, "ptr"):
        raise SimtError(f"{where} is {type(argument).__name__}, the kernel takes {parameter}")
    if parameter.dtype not in ("", "V", _dtype_code(argument.dtype)):
        raise SimtError(f"{where} has dtype {argument.dtype}, the kernel takes {parameter}")
    if parameter.size <= 16 and argument.size and argument.data.ptr % parameter.size:
        raise SimtError(f"{where} is not aligned to {parameter.size} bytes")


def _extent(array):
    """First address and number of bytes of a view, whatever its strides."""
    if array.size == 0:
        return array.data.ptr, 0
    steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    first = array.data.ptr + sum(step for step in steps if step < 0)
    return first, sum(map(abs, steps)) + array.dtype.itemsize


def _value(argument, parameter, where):
    """The bytes that CuPy passes for a value: of a NumPy scalar or one-element array its own; a
    Python int or float takes 8."""
    if type(argument) in (int, float, bool):
        argument = np.array(argument)
    is_value = isinstance(argument, np.ndarray) and argument.size == 1
    is_value |= isinstance(argument, np.generic) and not isinstance(argument, np.void)
    if not is_value:
        raise SimtError(f"{where} is {type(argument).__name__}, the kernel takes {parameter}")
    dtype = argument.dtype
    if (_dtype_code(dtype), dtype.itemsize) != (parameter.dtype, parameter.size):
        given = f"{dtype} of {dtype.itemsize} bytes"
        raise SimtError(f"{where} is {given}, the kernel takes {parameter}")
    if parameter.members:
        given = [(name, dtype.fields[name][1], _dtype_code(dtype[name])) for name in dtype.names]
        if given != parameter.members:
            raise SimtError(f"{where} has members {given}, the kernel's are {parameter.members}")
    return (ctypes.c_char * parameter.size).from_buffer_copy(argument.tobytes())
