"""Networks and training in files: ``.npz``, without pickle."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from deformable.nn.layer import Buffer, Layer, load_buffers, to_host
from deformable.nn.optim import Optimizer

OPTIMIZER = "optimizer/"  # before the names of its arrays


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
    arrays: dict[str, Any] = {name: to_host(buffer.data) for name, buffer in buffers.items()}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], layer: Layer, optimizer: Optimizer | None = None) -> None:
    """Read what :func:`save` wrote into a layer, and into an optimizer where one is given.

    Arrays go to the library on which ``layer`` is. Nothing is changed unless all of it fits.

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
        Where a name is missing or unknown, a shape or dtype differs, or the file holds objects.
    """
    buffers = _named(layer, optimizer)
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if optimizer or not name.startswith(OPTIMIZER)]
        state = {name: file[name] for name in names}
    for name in state.keys() & buffers.keys():
        dtype = buffers[name].data.dtype
        if dtype.name == "bfloat16" and state[name].dtype == "V2":  # how .npy files spell it
            state[name] = state[name].view(dtype)
    load_buffers("load", buffers, state)


def _named(layer: Layer, optimizer: Optimizer | None) -> dict[str, Buffer]:
    """The arrays of both by the names that they have in a file."""
    trained = {} if optimizer is None else optimizer.buffers()
    return layer.buffers() | {OPTIMIZER + name: buffer for name, buffer in trained.items()}
