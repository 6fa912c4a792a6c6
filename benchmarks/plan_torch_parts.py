"""Torch's own estimators on the models of plan_accuracy.py: what they say, and how long they take.

$ python benchmarks/plan_torch_parts.py
"""

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from plan_models import BATCH, CONTEXT, SUBJECTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW


def step(name: str, model: nn.Module) -> None:
    subject = SUBJECTS[name]
    args, _ = subject.inputs(BATCH, CONTEXT)
    assert subject.loss is not None
    subject.loss(model(*args)).backward()


def mem_tracker(name: str) -> str:
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model = SUBJECTS[name].build()
        optimizer = AdamW(model.parameters(), lr=1e-4)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        return _peak(tracker, name, model, optimizer)


def _peak(tracker: Any, name: str, model: nn.Module, optimizer: AdamW) -> str:
    """What was held at most in the second of two steps, by kind, in MB."""
    with tracker:
        for i in range(2):
            step(name, model)
            optimizer.step()
            optimizer.zero_grad()
            if i == 0:
                tracker.reset_mod_stats()
    return ", ".join(
        f"{device}: " + ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in found.items())
        for device, found in tracker.get_tracker_snapshot("peak").items()
    )


def fsdp_mem_tracker(name: str) -> str:
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        with FakeTensorMode():
            model = SUBJECTS[name].build()
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = AdamW(model.parameters(), lr=1e-4)
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs(tuple(SUBJECTS[name].inputs(BATCH, CONTEXT)[0]))
            return _peak(tracker, name, model, optimizer)
    finally:
        dist.destroy_process_group()


def runtime_estimator(name: str) -> str:
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator

    with FakeTensorMode():
        model = SUBJECTS[name].build()
        estimator = RuntimeEstimator()
        with estimator("operator-level-cost-model"):
            step(name, model)
    return f"{estimator.total_runtime:.3f} ms"


def sac_estimator(name: str) -> str:
    from torch.distributed._tools.sac_estimator import SACEstimator

    with FakeTensorMode():
        model = SUBJECTS[name].build()
        estimator = SACEstimator()
        with estimator(estimate_mode_type="operator-level-cost-model"):
            step(name, model)
    sizes = {fqn: stats.total_memory for fqn, stats in estimator.sac_mod_stats.items()}
    return ", ".join(f"{fqn} {size / 1e6:.2f} MB" for fqn, size in list(sizes.items())[:4])


def main() -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[str], Any]] = {
        "MemTracker": mem_tracker,
        "FSDPMemTracker": fsdp_mem_tracker,
        "RuntimeEstimator": runtime_estimator,
        "SACEstimator": sac_estimator,
    }
    for part, run in parts.items():
        for name in ("gpt", "conv"):
            begin = time.perf_counter()
            try:
                found = run(name)
            except Exception as error:  # what fails is what is asked
                found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                found += f" at {traceback.extract_tb(error.__traceback__)[-1].name}"
            print(f"{part}, {name}: {found} ({time.perf_counter() - begin:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
