"""What other libraries must find in the environment."""

import os


def prepare_for_deepspeed(device_type: str, local_rank: int) -> None:
    """Tell deepspeed its accelerator, which it reads once on import, and its local rank, read at every step."""
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
