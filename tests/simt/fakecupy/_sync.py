"""Every wait of the host for the device is counted, and can be forbidden."""

import contextlib

count = 0
_allowed = True


class DeviceSynchronized(RuntimeError):
    """The host waited for the device where that is forbidden."""


def declare(why):
    """Called by whatever makes the host wait."""
    global count
    count += 1
    if not _allowed:
        raise DeviceSynchronized(f"{why} waits for the device")


@contextlib.contextmanager
def forbidden():
    """Raise DeviceSynchronized at the first wait."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before
