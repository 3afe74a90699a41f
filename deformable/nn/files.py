"""Networks and training in files: ``.npz``, without pickle."""

import os
import uuid
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from deformable.nn.layer import Buffer, Layer, check_state, load_buffers, to_host
from deformable.nn.optim import Optimizer

OPTIMIZER = "optimizer/"  # before the names of its arrays
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)  # what reading raises


def save(path: str | os.PathLike[str], layer: Layer, optimizer: Optimizer | None = None) -> None:
    """Write the state of a layer, and of its optimizer where training shall go on later.

    The file appears under its name only when it is complete: whoever is killed while writing
    leaves the one from before.

    Parameters
    ----------
    path : path
        Written as it is, ending in ``.npz`` by custom.
    layer : Layer
    optimizer : Optimizer, optional

    Examples
    --------
    >>> import tempfile
    >>> from deformable import nn
    >>> layer, other = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nn.save(f"{folder}/layer.npz", layer)
    ...     nn.load(f"{folder}/layer.npz", other)
    >>> bool((layer.weight.data == other.weight.data).all())
    True
    """
    buffers = _named(layer, optimizer)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # no other writer's
    try:
        with open(unfinished, "wb") as file:
            _write(file, {name: to_host(buffer.data) for name, buffer in buffers.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], layer: Layer, optimizer: Optimizer | None = None) -> None:
    """Read what :func:`save` wrote into a layer, and into an optimizer where one is given.

    Arrays go to the library on which ``layer`` is. Nothing is changed unless all of it fits. Names,
    shapes and dtypes are compared before any array is read, and no more than these say is read:
    a file from anywhere can neither run code nor fill the memory.

    Parameters
    ----------
    path : path
    layer : Layer
        Of the same structure and dtypes as the one written.
    optimizer : Optimizer, optional
        Then the file must hold one.

    Raises
    ------
    ValueError
        Where a name is missing, unknown or there twice, a shape or dtype differs, or the file is no
        complete archive of arrays.
    """
    buffers = _named(layer, optimizer)
    try:
        state = _read(path, buffers, with_optimizer=optimizer is not None)
    except BROKEN as error:
        if str(error).startswith("load: "):
            raise
        raise ValueError(f"load: {path} is no complete archive of arrays: {error}") from error
    load_buffers("load", buffers, state)


def _write(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """As ``np.savez``, whose own arguments are names that no array can have."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


class Header(NamedTuple):
    """What a file says of an array before the array itself."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _read(
    path: str | os.PathLike[str], buffers: dict[str, Buffer], with_optimizer: bool
) -> dict[str, np.ndarray]:
    """The arrays of a file, which are those of ``buffers``."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        members = dict(zip(names, archive.infolist(), strict=True))
        if len(members) < len(names):
            raise ValueError(f"load: {path} has two arrays of one name")
        chosen = [name for name in names if with_optimizer or not name.startswith(OPTIMIZER)]
        headers = {}
        for name in chosen:
            with archive.open(members[name]) as file:
                headers[name] = _header(file, buffers.get(name))
        check_state("load", buffers, headers)
        state = {}
        for name in chosen:
            with archive.open(members[name]) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            state[name] = array.view(headers[name].dtype)
    return state


def _header(file: IO[bytes], buffer: Buffer | None) -> Header:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"its .npy format is version {version}")
    shape, _, dtype = read[version](file)
    if buffer is not None and buffer.data.dtype.name == "bfloat16" and dtype == "V2":
        dtype = buffer.data.dtype  # how .npy files spell it
    return Header(shape, dtype)


def _named(layer: Layer, optimizer: Optimizer | None) -> dict[str, Buffer]:
    """The arrays of both by the names that they have in a file."""
    trained = {} if optimizer is None else optimizer.buffers()
    return layer.buffers() | {OPTIMIZER + name: buffer for name, buffer in trained.items()}
