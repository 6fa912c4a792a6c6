"""What `fabric.setup` gives back behaves like the user's own module, under every strategy."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fabriclite import ConfigError, Fabric, SetupOrderError
from fabriclite.module import unwrap
from fabriclite.shards import full
from models import MODELS
from worlds import run

EVERYWHERE = [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tp", 2), ("tp", 4), ("zero3", 2)]


class Net(nn.Module):
    """Users' modules: attributes, properties, methods that compute, methods that do not."""

    _tp_plan = {"body.0": "colwise", "body.2": "rowwise"}  # noqa: RUF012  # as models carry it
    kind = "net"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.note = {"a": 1}
        self.calls = 0

    @property
    def width(self) -> int:
        return 4

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        self.calls += 1
        return self.body(x) * self.scale * gain

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Through forward."""
        return F.mse_loss(self(x), y)

    def loss_by_parts(self, x: Tensor, y: Tensor) -> Tensor:
        """Around forward: a submodule, then a parameter of the root."""
        return F.mse_loss(self.body(x) * self.scale, y)

    def loss_of_root(self, x: Tensor, y: Tensor) -> Tensor:
        """A parameter of the root before any submodule."""
        return F.mse_loss(self.body(x * self.scale), y)

    def fails_in_the_middle(self, x: Tensor) -> None:
        self.body(x)
        raise KeyError("mine")

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def setup(fabric: Fabric) -> tuple[Any, Any]:
    fabric.seed_everything(3)
    with fabric.init_module():
        module = Net()
    return fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))


def data(fabric: Fabric) -> tuple[Tensor, Tensor]:
    replicas, index = fabric._running.sampler_shard()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return x.chunk(replicas)[index], y.chunk(replicas)[index]


def looks_like_the_users(fabric: Fabric) -> bool:
    model, _ = setup(fabric)
    assert isinstance(model, Net)
    assert isinstance(model, nn.Module)
    assert model.kind == "net"
    assert model.width == 4
    assert model.note == {"a": 1}
    assert pickle.loads(pickle.dumps(model.note)) == {"a": 1}
    model.note["b"] = 2
    model.extra = [1]
    assert unwrap(model).note == {"a": 1, "b": 2}
    assert unwrap(model).extra == [1]
    del model.extra
    assert not hasattr(model, "extra")
    assert list(model.state_dict()) == list(Net().state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in Net().named_parameters()]
    assert model.train() is model
    assert model.eval() is model
    assert not model.training
    assert not unwrap(model).training
    model.train()
    assert repr(model) == repr(unwrap(model))
    assert {"loss", "body", "state_dict", "mark_forward_method"} <= set(dir(model))
    assert len(model.body) == 3
    with pytest.raises(AttributeError, match="nothing_here"):
        model.nothing_here  # noqa: B018
    x, _ = data(fabric)
    assert model(x, gain=2.0).shape == x.shape
    assert model.calls == 1
    return True


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_looks_like_the_users(strategy: str, world: int) -> None:
    assert run(looks_like_the_users, strategy, world)


METHODS = ["forward", "loss", "loss_by_parts", "loss_of_root"]


def train_through(fabric: Fabric, method: str) -> list[Tensor]:
    model, optimizer = setup(fabric)
    x, y = data(fabric)
    if method == "loss_of_root":
        model.mark_forward_method("loss_of_root")
    for _ in range(2):
        loss = F.mse_loss(model(x), y) if method == "forward" else getattr(model, method)(x, y)
        fabric.backward(loss, model=model)
        optimizer.step()
        optimizer.zero_grad()
    return [full(v).detach().clone() for v in model.state_dict().values()]


def train_all(fabric: Fabric) -> dict[str, list[Tensor]]:
    return {method: train_through(fabric, method) for method in METHODS}


def by_hand(method: str) -> list[Tensor]:
    torch.manual_seed(3)
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
    for _ in range(2):
        loss = F.mse_loss(module(x), y) if method == "forward" else getattr(module, method)(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(module.state_dict().values())


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_methods_train_as_forward_does(strategy: str, world: int) -> None:  # peers row 15
    results = run(train_all, strategy, world)
    for method in METHODS:
        for actual, wanted in zip(results[method], by_hand(method), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def methods_leave_nothing(fabric: Fabric) -> bool:
    model, optimizer = setup(fabric)
    x, y = data(fabric)
    with torch.no_grad():
        model(x)  # leaves FSDP2's root gathered (trap 1)
    made = model.make_optimizer()
    assert [id(p) for p in made.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    with pytest.raises(KeyError, match="mine"):
        model.fails_in_the_middle(x)
    assert not torch.is_autocast_enabled("cpu")
    assert not nn.modules.module._global_forward_pre_hooks
    before = full(model.state_dict()["body.0.weight"]).clone()
    fabric.backward(model.loss(x, y), model=model)
    optimizer.step()
    return not torch.equal(full(model.state_dict()["body.0.weight"]), before)


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[:-1])  # under ZeRO-3 no optimizer is made after
def test_methods_leave_nothing_behind(strategy: str, world: int) -> None:
    assert run(methods_leave_nothing, strategy, world, precision="bf16-mixed")


def block_first(fabric: Fabric) -> bool:
    """A block called alone computes before the model ever ran, and the model trains after."""
    fabric.seed_everything(0)
    module = MODELS["gpt"]()
    hidden = torch.randn(1, 4, 32)
    wanted = module.blocks[0](hidden).detach()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with torch.no_grad():
        torch.testing.assert_close(model.blocks[0](hidden), wanted)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    before = model(tokens).detach()
    fabric.backward(model(tokens).square().mean(), model=model)
    optimizer.step()
    return not torch.equal(model(tokens).detach(), before)


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_a_block_may_be_called_first(strategy: str, world: int) -> None:
    assert run(block_first, strategy, world)


def around_ddp(fabric: Fabric, way: str) -> str:
    model, _ = setup(fabric)
    x, y = data(fabric)
    if way == "submodule":
        loss = F.mse_loss(model.body(x), y)
    else:
        output = model(x)
        fabric.backward(F.mse_loss(output, y), retain_graph=True)
        loss = output.sum()
    with pytest.raises(SetupOrderError) as caught:
        fabric.backward(loss)
    with fabric.no_backward_sync(model):  # there nobody expects an average
        fabric.backward(F.mse_loss(model.body(x), y))
    return str(caught.value)


@pytest.mark.parametrize("way", ["submodule", "twice"])
def test_gradients_that_ddp_would_not_average_are_an_error(way: str) -> None:
    assert "DDP would leave them unaveraged" in run(around_ddp, "ddp", 2, way)


def alone(fabric: Fabric) -> float:
    """One rank alone evaluates and generates: no collective may wait for the other."""
    fabric.seed_everything(0)
    model = fabric.setup(MODELS["gpt"]())
    if fabric.is_global_zero:
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))
        model.generate(torch.zeros(1, 4, dtype=torch.long), 3)
    fabric.barrier()
    return float(model.config.dim)


def test_one_rank_alone_may_evaluate_under_ddp() -> None:
    assert run(alone, "ddp", 2) == 32


def generates(fabric: Fabric) -> list[int]:
    fabric.seed_everything(0)
    with fabric.init_module():
        module = MODELS["gpt"]()
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    tokens: list[int] = model.generate(torch.zeros(1, 2, dtype=torch.long), 5, temperature=1e-4)[0].tolist()
    return tokens


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[1:])
def test_generate_gives_the_same_tokens(strategy: str, world: int) -> None:
    assert run(generates, strategy, world) == run(generates, "single_device", 1)


@pytest.mark.parametrize("strategy", ["single_device", "ddp"])
def test_copies_and_pickles_are_plain_modules(strategy: str) -> None:
    model, _ = setup(Fabric(accelerator="cpu", devices=1, strategy=strategy))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(twin) is Net
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert copy.deepcopy(model).scale is not model.scale


def test_fsdp_refuses_copies_clearly() -> None:
    model, _ = setup(Fabric(accelerator="cpu", devices=1, strategy="fsdp"))
    with pytest.raises(AssertionError, match="deepcopy"):
        copy.deepcopy(model)


def test_containers_stay_containers() -> None:
    model = Fabric(accelerator="cpu", devices=1).setup(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert len(model) == 2
    assert isinstance(model[0], nn.Linear)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU]
    assert model[1] in model
    assert model
    assert nn.Sequential(model, nn.Linear(3, 1))(torch.ones(1, 2)).shape == (1, 1)


def test_load_state_dict_answers_as_torch_does() -> None:
    model, _ = setup(Fabric(accelerator="cpu", devices=1))
    state = {**Net().state_dict(), "more": torch.ones(1)}
    del state["scale"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["scale"], ["more"])


def test_signature_and_items_are_the_modules() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, _ = setup(fabric)
    assert list(inspect.signature(model.forward).parameters) == ["x", "gain"]
    layers = fabric.setup(nn.ModuleList([nn.Linear(1, 1)]))
    layers[0] = nn.Linear(2, 2)
    assert layers[0].in_features == 2
    del layers[0]
    assert len(layers) == 0


def says_how_to_mark(fabric: Fabric) -> list[str]:
    model, _ = setup(fabric)
    with pytest.raises(RuntimeError) as caught:
        model.loss_of_root(*data(fabric))
    return list(caught.value.__notes__)


def test_a_sharded_parameter_used_too_early_says_what_to_do() -> None:
    assert "model.mark_forward_method('loss_of_root')" in run(says_how_to_mark, "fsdp", 2)[0]


def test_methods_compute_in_mixed_precision_from_their_first_line() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def direct(self, x: Tensor) -> Tensor:
            return F.linear(x, self.lin.weight)

    model = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(Direct())
    assert model.direct(torch.ones(1, 2)).dtype == torch.bfloat16


def test_a_module_holding_one_that_was_set_up_is_refused() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = nn.Linear(2, 2)
    model = fabric.setup(inner)
    assert model.in_features == 2
    with pytest.raises(SetupOrderError, match="holds a Linear that was set up before"):
        fabric.setup(nn.Sequential(inner, nn.ReLU()))


def unfrozen_later(fabric: Fabric) -> str:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    model = fabric.setup(module)
    model[0].requires_grad_(True)
    with pytest.raises(SetupOrderError) as caught:
        fabric.backward(model(torch.ones(2, 4) * fabric.global_rank).sum())
    return str(caught.value)


def test_ddp_refuses_parameters_it_would_not_average() -> None:
    assert "one was added or unfrozen after" in run(unfrozen_later, "ddp", 2)


def test_module_of_the_pane_is_the_users_unless_it_has_one() -> None:
    class Has(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    fabric = Fabric(accelerator="cpu", devices=1)
    plain, has = Net(), Has()
    assert fabric.setup(plain).module is plain
    assert fabric.setup(has).module is has.module


def test_assign_is_refused_after_setup() -> None:
    model, _ = setup(Fabric(accelerator="cpu", devices=1))
    with pytest.raises(ConfigError, match="`assign` must be False after setup"):
        model.load_state_dict(Net().state_dict(), assign=True)


def test_half_precision_takes_float32_inputs_and_keeps_outputs() -> None:  # peers row 14
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = fabric.setup(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).dtype == torch.bfloat16

    class Times(nn.Module):
        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            assert position.dtype == torch.float64
            return x

    assert fabric.setup(Times())(torch.ones(1), torch.ones(1, dtype=torch.float64)).dtype == torch.bfloat16


def keeps_float32_inputs(fabric: Fabric) -> torch.dtype:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            assert position.dtype == torch.float32
            return self.lin(x)

    module = Times()
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    dtype: torch.dtype = model(torch.ones(1, 2), torch.ones(1)).dtype
    return dtype


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)])
def test_mixed_precision_casts_no_inputs(strategy: str, world: int) -> None:  # peers row 14
    assert run(keeps_float32_inputs, strategy, world, precision="bf16-mixed") == torch.bfloat16


def compiles(fabric: Fabric, order: str) -> list[float]:
    fabric.seed_everything(3)
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if order == "before":
        model, optimizer = fabric.setup(torch.compile(module, backend="aot_eager"), optimizer)
    else:
        model, optimizer = fabric.setup(module, optimizer)
        model.compile(backend="aot_eager")
    x, y = data(fabric)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    assert type(unwrap(model)).__name__.endswith("Net")
    return losses


def compiled_methods(fabric: Fabric) -> float:
    fabric.seed_everything(3)
    module = Net()
    model, _ = fabric.setup(torch.compile(module, backend="aot_eager"), torch.optim.SGD(module.parameters(), lr=0.1))
    loss = model.loss(*data(fabric))
    fabric.backward(loss)
    return fabric.all_reduce(loss.detach()).item()


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2)])
def test_methods_of_a_compiled_module_compute(strategy: str, world: int) -> None:
    assert run(compiled_methods, strategy, world) == pytest.approx(F.mse_loss(*_plain()).item(), rel=1e-6)


@pytest.mark.parametrize(("strategy", "world"), [("single_device", 1), ("ddp", 2), ("fsdp", 2)])
def test_torch_compile_before_and_after_setup(strategy: str, world: int) -> None:  # peers row 16
    compile_before = torch.compile
    before, after = (run(compiles, strategy, world, order) for order in ("before", "after"))
    assert before == pytest.approx(after, rel=1e-6)
    assert before[0] == pytest.approx(F.mse_loss(*_plain()).item(), rel=1e-6)
    assert torch.compile is compile_before


def _plain() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    module = Net()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return module(x), y
