"""What every test stands on: one thread, a warm fork server, no process group left behind."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from fabriclite.launch import spawn
from fabriclite.launch.failures import hooks

# The fork server imports these once; each world of ranks then starts in hundredths of a second.
spawn.PRELOAD.extend(
    [
        "torch._dynamo",  # fully_shard imports it: 1.5 s in every rank
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint",
        "fabriclite",
        "fabriclite.strategies.fsdp",
        "fabriclite.strategies.tensor_parallel",
        "fabriclite.checkpoint.session",
    ]
)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    hooks.forget()
    assert torch.get_default_dtype() == dtype, "a test changed the default dtype"
