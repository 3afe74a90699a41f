"""Which device and which stream are current in a thread, and a record of what was done where."""

import contextlib
import threading

DEVICES = 2
NULL_STREAM = 0


class _Current(threading.local):
    def __init__(self):
        self.device = 0
        self.stream = NULL_STREAM


current = _Current()
_records = []


def note(what):
    """Called by whatever is put into the current stream of the current device."""
    for record in _records:
        record.append((what, current.device, current.stream))


@contextlib.contextmanager
def record():
    """A list to which (what, device, stream) is added for every launch and matrix product."""
    entries = []
    _records.append(entries)
    try:
        yield entries
    finally:
        _records.remove(entries)


def check_device(device):
    """Refuse memory of another device, as cupy does where devices cannot see each other's."""
    if device is not None and device != current.device:
        raise ValueError(
            "Array device must be same as the current device: "
            f"array device = {device} while current = {current.device}"
        )
