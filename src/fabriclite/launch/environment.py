"""What other libraries must find in the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def use_cpu_in_deepspeed() -> None:
    """Make deepspeed compute on the CPU. It reads this once, when it is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"


@contextmanager
def local_rank_for_deepspeed(local_rank: int) -> Iterator[None]:
    """Say LOCAL_RANK, which deepspeed insists on, also where no launcher did; undone after."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
