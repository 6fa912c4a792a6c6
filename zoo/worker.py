"""What a worker process of the zoo does: trials, one after the other, until the pipe closes."""

import gc
import resource
import warnings
from multiprocessing.connection import Connection

MEMORY = 8 << 30
"""Bytes of address space: a model that turns out huge is an error of its own, not the machine's."""


def serve(connection: Connection) -> None:
    """Answer each entry that comes through ``connection`` with its outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    # Before transformers is imported, which asks once whether torchvision is there.
    from zoo import torchvision_stub

    torchvision_stub.install()
    import torch

    from zoo import trial

    torch.set_num_threads(1)
    while True:
        try:
            entry = connection.recv()
        except EOFError:
            return
        connection.send(trial.run(entry))
        gc.collect()
