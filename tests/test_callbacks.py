"""Hooks: each is told at its moment, once, in order, with what is documented; under every strategy."""

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fabriclite import ConfigError, DDPStrategy, Fabric, LaunchError
from fabriclite.callbacks import HOOKS
from fabriclite.collectives import gather_objects
from worlds import STRATEGIES

ARGUMENTS = {
    "on_after_setup": {"fabric", "module"},
    "on_before_batch": {"loader"},
    "on_after_batch": {"loader", "batch"},
    "on_before_forward": {"module", "args", "kwargs"},
    "on_after_forward": {"module", "output"},
    "on_before_backward": {"loss"},
    "on_after_backward": {"loss"},
    "on_before_clip_gradients": {"module", "optimizer"},
    "on_after_clip_gradients": {"module", "optimizer", "norm"},
    "on_before_optimizer_step": {"strategy", "optimizer"},
    "on_after_optimizer_step": {"strategy", "optimizer"},
    "on_after_save": {"path", "asynchronous"},
    "on_after_load": {"path"},
}
STEP = [
    *("before_batch", "after_batch", "before_forward", "after_forward", "before_backward", "after_backward"),
    *("before_clip_gradients", "after_clip_gradients", "before_optimizer_step", "after_optimizer_step"),
]

FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="as stage 3; asked for by FULL=1")

HEARD: list[tuple[str, dict[str, Any]]] = []
"""What the callback of this process was told."""


class Listens:
    """Knows every hook."""

    def __getattr__(self, name: str) -> Any:
        if name not in HOOKS:
            raise AttributeError(name)
        return lambda **kwargs: HEARD.append((name, kwargs))


class Net(nn.Module):
    _tp_plan = {"up": "colwise", "down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(x))) * scale

    def generate(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self(x)
        return x


def launched(strategy: Any, world: int, function: Any, *args: Any, precision: Any = "32-true") -> Any:
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=world, precision=precision, callbacks=Listens())
    HEARD.clear()
    return fabric.launch(function, *args)


def names() -> list[str]:
    told = [name.removeprefix("on_") for name, _ in HEARD]
    HEARD.clear()
    return told


def whole_run(fabric: Fabric, folder: str) -> list[Any]:
    """What each rank was told, and what of it was not as documented."""
    fabric.seed_everything(1)
    with fabric.init_module():
        net = Net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(list(torch.randn(4 * fabric.world_size, 4)), batch_size=2))
    wrong: list[str] = []
    told = []

    def expect(hook: str, **wanted: Any) -> None:
        given = [kwargs for name, kwargs in HEARD if name == hook][-1]
        wrong.extend(f"{hook} {key}" for key, value in wanted.items() if given[key] is not value)
        if set(given) != ARGUMENTS[hook]:
            wrong.append(f"{hook} got {sorted(given)}")

    expect("on_after_setup", fabric=fabric, module=model)
    told.append(names())
    for batch in loader:
        output = model(batch, scale=0.5)
        loss = output.square().mean()
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        expect("on_before_batch", loader=loader)
        expect("on_after_batch", loader=loader, batch=batch)
        expect("on_before_forward", module=model)
        expect("on_after_forward", module=model, output=output)
        expect("on_before_backward", loss=loss)
        expect("on_after_backward", loss=loss)
        expect("on_before_clip_gradients", module=model, optimizer=optimizer)
        expect("on_after_clip_gradients", module=model, optimizer=optimizer, norm=norm)
        expect("on_before_optimizer_step", strategy=fabric.strategy, optimizer=optimizer)
        expect("on_after_optimizer_step", strategy=fabric.strategy, optimizer=optimizer)
        before = next(kwargs for name, kwargs in HEARD if name == "on_before_forward")
        if before["args"][0] is not batch or before["kwargs"] != {"scale": 0.5}:
            wrong.append("arguments of forward")
        told.append(names())
    told.append(names())
    with torch.no_grad():
        model.generate(torch.ones(1, 4))
        model.forward(torch.ones(1, 4))
    told.append(names())
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    expect("on_after_save", path=folder, asynchronous=False)
    fabric.load(folder, {"model": model, "optimizer": optimizer})
    expect("on_after_load", path=folder)
    told.append(names())
    return gather_objects(fabric._ready_world, (told, wrong))


@pytest.mark.parametrize(
    ("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2), ("zero3", 2)]
)
def test_every_hook_at_its_moment(tmp_path: Any, strategy: str, world: int) -> None:
    assert set(ARGUMENTS) == set(HOOKS)
    for rank, (told, wrong) in enumerate(launched(STRATEGIES[strategy], world, whole_run, str(tmp_path / "saved"))):
        assert not wrong, f"rank {rank}: {wrong}"
        steps = [STEP] * (4 if strategy == "tp" else 2)  # both ranks of tensor parallel read all batches
        calls = ["before_forward", "after_forward"]  # of `forward`; `generate` is not told of
        assert told == [["after_setup"], *steps, ["before_batch"], calls, ["after_save", "after_load"]], f"rank {rank}"


def parts(fabric: Fabric) -> list[Any]:
    """Several optimizers, set up apart from the module; two batches for each step; clipping by value."""
    model = fabric.setup_module(Net())
    halves = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.up, model.down)]
    first, second = fabric.setup_optimizers(*halves)
    told = [names()]
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(2, 4)).sum())
    fabric.backward(model(torch.ones(2, 4)).sum())
    fabric.clip_gradients(model, first, clip_val=1.0)
    clipped = HEARD[-1]
    told.append(names())
    for optimizer in (first, second):
        optimizer.step()
        found = [kwargs["optimizer"] is optimizer for _, kwargs in HEARD]
        told.append([*names(), found])
    return gather_objects(fabric._ready_world, (told, clipped[0], clipped[1]["norm"]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulation_and_several_optimizers(strategy: str) -> None:
    step = ["before_optimizer_step", "after_optimizer_step", [True, True]]
    one = ["before_forward", "after_forward", "before_backward", "after_backward"]
    for told, hook, norm in launched(STRATEGIES[strategy], 2, parts):
        assert told == [["after_setup"], [*one, *one, "before_clip_gradients", "after_clip_gradients"], step, step]
        assert (hook, norm) == ("on_after_clip_gradients", None)


def overflow(fabric: Fabric, factor: float) -> list[Any]:
    """Each step with gradients that do or do not fit; what is told of it, and whether weights changed.

    And what hooks of torch are told that are taken away after the second.
    """
    fabric.seed_everything(1)
    with fabric.init_module():
        net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    counts, heard = [], []

    def hears(moment: str) -> Any:
        return lambda o, args, kwargs: heard.append((moment, o is optimizer, args[0] is optimizer, kwargs))

    before, after = hears("before"), hears("after")
    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    for step in range(4):
        for handle in handles if step == 2 else ():
            handle.remove()
        # on one rank alone, whose overflow skips the step of all
        big = factor if step % 2 == 0 and fabric.global_rank == fabric.world_size - 1 else 1.0
        names()
        fabric.backward((model(torch.ones(2, 4)) * big).float().mean() * (1.0 if big > 1.0 else 2**-20))
        old = [p.detach().clone() for p in model.state_dict().values()]
        optimizer.step()
        optimizer.zero_grad()
        new = list(model.state_dict().values())
        changed = any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
        counts.append((changed, [name for name in names() if "step" in name]))
    return gather_objects(fabric._ready_world, (counts, heard))


@pytest.mark.parametrize(
    ("strategy", "world", "precision"),
    [
        ("single_device", 1, "16-mixed"),
        ("ddp", 2, "16-mixed"),
        pytest.param("zero1", 2, "16-true", marks=FULL),
        ("zero3", 2, "16-true"),
    ],
)
def test_a_skipped_step_is_not_told(strategy: str, world: int, precision: str) -> None:
    told = launched(STRATEGIES[strategy], world, overflow, float("inf"), precision=precision)
    both = ["before_optimizer_step", "after_optimizer_step"]
    for counts, heard in told:
        assert heard == [("before", True, True, {}), ("after", True, True, {})]
        assert [names for _, names in counts] == [[], both, [], both]
        assert [changed for changed, names in counts if not names] == [False, False]


def closure(fabric: Fabric) -> list[str]:
    model, optimizer = fabric.setup(net := Net(), torch.optim.LBFGS(net.parameters(), max_iter=2))
    names()

    def again() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        return loss

    optimizer.step(again)
    return names()


def test_a_closure_is_within_the_step() -> None:
    told = launched("single_device", 1, closure)
    inner = ["before_forward", "after_forward", "before_backward", "after_backward"]
    assert told[0] == "before_optimizer_step"
    assert told[-1] == "after_optimizer_step"
    assert told[1:-1] == inner * ((len(told) - 2) // 4)
    assert len(told) > 5


# -- what callbacks do -------------------------------------------------------------------------------------------------


class OfLightning:
    """As written for Lightning Fabric: positional names are its own."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        self.heard.append(f"{type(fabric).__name__} {module.__class__.__name__}")

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.heard.append(f"{type(strategy).__name__} {type(optimizer).__name__}")

    def on_validation_epoch_end(self) -> None:
        self.heard.append("validated")


def one(*callbacks: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy="single_device", callbacks=list(callbacks))


def step(fabric: Fabric) -> tuple[Any, Any]:
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4)).mean())
    optimizer.step()
    return model, optimizer


def test_callbacks_of_lightning() -> None:
    callback = OfLightning()
    fabric = one(callback)
    step(fabric)
    fabric.call("on_validation_epoch_end")
    assert callback.heard == ["Fabric Net", "SingleDeviceStrategy SGD", "validated"]


class Sour:
    def __init__(self, rank: int, hook: str) -> None:
        self.rank = rank
        setattr(self, hook, self._fail)

    def _fail(self, **kwargs: Any) -> None:
        if self.rank in (-1, torch.distributed.get_rank()):
            raise ValueError("out of tune")


class Badge:
    on_after_backward = 3


def test_an_error_names_the_callback() -> None:
    class Loud:
        def on_after_backward(self, loss: Tensor) -> None:
            raise KeyError("out of tune")

    with pytest.raises(KeyError, match="out of tune") as caught:
        step(one(OfLightning(), Loud()))
    assert caught.value.__notes__ == ["Raised by the callback Loud.on_after_backward."]
    with pytest.raises(ConfigError, match=r"Badge.on_after_backward must be a method to be called, but is 3\."):
        step(one(Badge()))


def train_on(fabric: Fabric) -> None:
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(1000):
        fabric.backward(model(torch.ones(2, 4)).mean())
        optimizer.step()


@pytest.mark.parametrize("hook", ["on_after_setup", "on_after_optimizer_step"])
def test_an_error_on_one_rank_ends_the_run(hook: str) -> None:
    config = DDPStrategy(start_method="forkserver")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=config, callbacks=[Sour(1, hook)])
    with pytest.raises(LaunchError, match="out of tune") as caught:
        fabric.launch(train_on)
    assert f"Raised by the callback Sour.{hook}." in str(caught.value)
    assert "Rank 1 of 2 failed first" in str(caught.value)


class Joins:
    """Adds a callback, and takes itself away, while it is told."""

    def __init__(self, fabric: Fabric, other: Any) -> None:
        self.fabric, self.other = fabric, other

    def on_after_backward(self, loss: Tensor) -> None:
        self.fabric._callbacks.add(self.other)
        self.fabric._callbacks.remove(self)


def test_who_is_told_now_stays_as_it_is() -> None:
    HEARD.clear()
    fabric = one()
    fabric._callbacks.add(Joins(fabric, Listens()))
    step(fabric)
    assert names() == ["before_optimizer_step", "after_optimizer_step"]
    model, _ = step(fabric)
    assert names()[0] == "after_setup"
    model(torch.ones(1, 4))
    assert names() == ["before_forward", "after_forward"]


class Locked(Listens):
    """Nothing that can be copied or pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


def test_copies_tell_nobody() -> None:
    fabric = one(Locked())
    model, optimizer = step(fabric)
    loader = fabric.setup_dataloaders(DataLoader(list(torch.randn(4, 4)), batch_size=2))
    HEARD.clear()
    for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        plain, stepping = again(model), again(optimizer)
        plain(torch.ones(1, 4)).mean().backward()
        stepping.step()
        assert stepping.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert len(list(copy.deepcopy(loader))) == 2
    assert names() == []
    assert len(list(loader)) == 2
    optimizer.step()
    batches = ["before_batch", "after_batch"] * 2 + ["before_batch"]
    assert names() == [*batches, "before_optimizer_step", "after_optimizer_step"]


def test_hooks_are_documented() -> None:
    import fabriclite.callbacks as page

    rows = [line.split("``")[1] for line in (page.__doc__ or "").splitlines() if line.startswith("``on_")]
    assert tuple(rows) == HOOKS
