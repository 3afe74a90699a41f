"""How launches run: which order of threads, which checks, which GPU is imitated."""

import contextlib
import dataclasses

ORDERS = ("forward", "reversed", "random")


@dataclasses.dataclass
class Settings:
    """What the tests can change; see ``configure``."""

    order: str = "forward"  # of the blocks of a grid and of the threads of a block
    seed: int = 0  # of the random order
    races: bool = True  # report unordered accesses to the same bytes
    steps: int = 1 << 28  # memory accesses and basic blocks, after which a launch counts as endless
    last_blocks: int | None = None  # run only so many blocks at the end of each grid
    compute_capability: str = "90"


settings = Settings()


@contextlib.contextmanager
def configure(**changes):
    """Run launches with other settings: ``with configure(order="reversed"): ...``."""
    changed = dataclasses.replace(settings, **changes)
    if changed.order not in ORDERS:
        raise ValueError(f"order is {changed.order!r}, expected one of {ORDERS}")
    before = dataclasses.asdict(settings)
    vars(settings).update(dataclasses.asdict(changed))
    try:
        yield
    finally:
        vars(settings).update(before)
