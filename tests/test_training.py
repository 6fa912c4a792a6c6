"""Training calls under every strategy: what peers get wrong (rows 9, 10, 13), and traps of torch that are silent."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import reference
from fabriclite import (
    ConfigError,
    DDPStrategy,
    DeepSpeedStrategy,
    Fabric,
    FSDPStrategy,
    ModelParallelStrategy,
    NonFiniteGradientError,
    SingleDeviceStrategy,
)
from fabriclite.module import unwrap
from fabriclite.shards import full, local
from fabriclite.strategies.wrapping import repeated_blocks, wrap_units
from models import MODELS, Tied, tiny_gpt
from worlds import run

EVERYWHERE = [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 2), ("tp", 4), ("zero3", 2)]


class Mlp(nn.Module):
    """Even for every split; a bare parameter, so that sharded and replicated ones stand side by side."""

    _tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}  # noqa: RUF012  # as models carry it

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)
            self.down = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def setup(fabric: Fabric, lr: float = 0.1) -> tuple[Any, Any]:
    fabric.seed_everything(3)
    with fabric.init_module():
        module = Mlp()
    return fabric.setup(module, torch.optim.SGD(module.parameters(), lr=lr))


def data(fabric: Fabric, seed: int = 0) -> tuple[Tensor, Tensor]:
    replicas, index = fabric._running.sampler_shard()
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return x.chunk(replicas)[index], y.chunk(replicas)[index]


def plain_gradients(scale: float = 1.0) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    module = Mlp()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
    (F.mse_loss(module(x), y) * scale).backward()
    return module, [p.grad for p in module.parameters() if p.grad is not None]


# -- clipping --------------------------------------------------------------------------------------


def norms(fabric: Fabric) -> dict[float, tuple[str, tuple[int, ...], float]]:
    found = {}
    for norm_type in (2.0, 1.0, math.inf):
        model, optimizer = setup(fabric)
        x, y = data(fabric)
        fabric.backward(F.mse_loss(model(x), y), model=model)
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.01, norm_type=norm_type)
        assert norm is not None
        found[norm_type] = (type(norm).__name__, tuple(norm.shape), norm.item())
    return found


@pytest.mark.parametrize(("strategy", "world"), [*EVERYWHERE, ("zero1", 2), ("zero2", 2), ("fsdp_offload", 2)])
def test_norm_is_a_plain_scalar_and_right_on_any_mesh(strategy: str, world: int) -> None:  # peers row 13
    found = run(norms, strategy, world)
    _, grads = plain_gradients()
    for norm_type, (kind, shape, value) in found.items():
        assert (kind, shape) == ("Tensor", ())
        assert value == pytest.approx(nn.utils.get_total_norm(grads, norm_type).item(), rel=1e-5)


def clipped(fabric: Fabric, by: dict[str, float]) -> list[Tensor]:
    model, optimizer = setup(fabric)
    x, y = data(fabric)
    fabric.backward(F.mse_loss(model(x), y), model=model)
    fabric.clip_gradients(model, optimizer, **by)
    optimizer.step()
    return [full(v).detach().clone() for v in model.state_dict().values()]


@pytest.mark.parametrize("by", [{"max_norm": 0.01}, {"clip_val": 0.003}], ids=["norm", "value"])
@pytest.mark.parametrize(("strategy", "world"), [*EVERYWHERE, ("zero1", 2)])
def test_clipped_step_is_that_of_plain_pytorch(strategy: str, world: int, by: dict[str, float]) -> None:
    module, _ = plain_gradients()
    if "max_norm" in by:
        nn.utils.clip_grad_norm_(module.parameters(), by["max_norm"])
    else:
        nn.utils.clip_grad_value_(module.parameters(), by["clip_val"])
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    for actual, wanted in zip(run(clipped, strategy, world, by), module.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def non_finite(fabric: Fabric) -> bool:
    model, optimizer = setup(fabric)
    x, y = data(fabric)
    fabric.backward(F.mse_loss(model(x), y) * math.inf, model=model)
    with pytest.raises(NonFiniteGradientError, match="2-norm must be finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm is not None
    return not norm.isfinite().item()


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_error_if_nonfinite_is_honoured(strategy: str, world: int) -> None:  # peers row 13
    assert run(non_finite, strategy, world)


# -- synchronising gradients -----------------------------------------------------------------------


def accumulates(fabric: Fabric) -> list[list[Tensor]]:
    """Weights after: a context that is off; nested ones; one that failed; several batches without any."""
    results = []
    for way in ("disabled", "nested", "failed", "plain"):
        model, optimizer = setup(fabric)
        if way == "disabled":
            with fabric.no_backward_sync(model, enabled=False):
                pass
        if way == "failed":
            with pytest.raises(KeyError), fabric.no_backward_sync(model):
                raise KeyError("mine")
        for step in range(2):
            x, y = data(fabric, seed=step)
            if way == "nested" and step == 0:
                with fabric.no_backward_sync(model):
                    with fabric.no_backward_sync(model):
                        pass
                    fabric.backward(F.mse_loss(model(x), y), model=model)
            else:
                fabric.backward(F.mse_loss(model(x), y), model=model)
        optimizer.step()
        results.append([full(v).detach().clone() for v in model.state_dict().values()])
    return results


@pytest.mark.parametrize(("strategy", "world"), [*EVERYWHERE, ("ddp_views", 2)])
def test_gradient_sync_comes_back(strategy: str, world: int) -> None:  # peers row 10
    torch.manual_seed(3)
    module = Mlp()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
        F.mse_loss(module(x), y).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    for result in run(accumulates, strategy, world):
        for actual, wanted in zip(result, module.state_dict().values(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def does_not_sync(fabric: Fabric) -> bool:
    """Inside the context ranks keep gradients of their own: the communication is really saved."""
    model, _ = setup(fabric)
    x, y = data(fabric, seed=fabric.global_rank)
    with fabric.no_backward_sync(model):
        fabric.backward(F.mse_loss(model(x + fabric.global_rank), y))
    if isinstance(unwrap(model), FSDPModule):
        return all(p.grad is None for p in model.parameters())  # kept whole, aside from the shards
    mine = torch.cat([p.grad.flatten() for p in unwrap(model).parameters() if p.grad is not None])
    both = fabric.all_gather(mine)
    return not torch.equal(both[0], both[1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_backward_sync_saves_the_communication(strategy: str) -> None:
    assert run(does_not_sync, strategy, 2)


# -- optimizers ------------------------------------------------------------------------------------


def joint_trains(fabric: Fabric) -> bool:
    model, optimizer = setup(fabric)
    before = [full(v).detach().clone() for v in model.state_dict().values()]
    x, y = data(fabric)
    fabric.backward(F.mse_loss(model(x), y), model=model)
    optimizer.step()
    return not any(torch.equal(full(a), b) for a, b in zip(model.state_dict().values(), before, strict=True))


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_an_optimizer_made_before_sharding_trains(strategy: str, world: int) -> None:  # peers row 9
    assert run(joint_trains, strategy, world)


def late_forms(fabric: Fabric) -> list[list[Tensor]]:
    """Made before `setup_module`, made after, and given one group per parameter."""
    results = []
    for form in ("before", "after", "groups"):
        fabric.seed_everything(3)
        module = Mlp()
        if form == "before":
            optimizer = torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-3)
        model = fabric.setup_module(module)
        if form == "after":
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
        if form == "groups":
            optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.01, eps=1e-3)
        same = optimizer
        optimizer = fabric.setup_optimizers(optimizer)
        assert optimizer is same, "the user's own optimizer"
        x, y = data(fabric)
        fabric.backward(F.mse_loss(model(x), y))
        optimizer.step()
        results.append([full(v).detach().clone() for v in model.state_dict().values()])
    return results


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[:-1])
def test_every_way_to_make_an_optimizer_is_the_same(strategy: str, world: int) -> None:
    before, after, groups = run(late_forms, strategy, world)
    for a, b, c in zip(before, after, groups, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


MAKERS: dict[str, Any] = {
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.5),  # holds the list of its parameters
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1),  # makes state at once
}


def kinds_of_optimizers(fabric: Fabric, names: list[str]) -> dict[str, float]:
    """How far the loss falls in some steps."""
    fell = {}
    for name in names:
        make = MAKERS[name]
        fabric.seed_everything(3)
        module = Mlp()
        model, optimizer = fabric.setup(module, make(module.parameters()))
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)

        def closure(model: Any = model, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)  # the same on every rank, so that every rank searches the same line
            fabric.backward(loss)
            return loss

        before = closure().item()
        for _ in range(2):
            optimizer.step(closure)
        fell[name] = closure().item() / before
    return fell


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[:-1])
def test_lbfgs_and_adagrad_made_before_setup_train(strategy: str, world: int) -> None:
    names = (
        ["adagrad"] if strategy == "tp" else ["adagrad", "lbfgs"]
    )  # LBFGS cannot mix sharded and plain: torch says so
    fell = run(kinds_of_optimizers, strategy, world, names)
    wanted = run(kinds_of_optimizers, "single_device", 1, names)
    assert fell == pytest.approx(wanted, rel=1e-3)
    assert max(fell.values()) < 0.95


def schedules(fabric: Fabric) -> list[float]:
    fabric.seed_everything(3)
    module = Mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    model, optimizer, scheduler = fabric.setup(module, optimizer, scheduler=scheduler)
    rates = []
    for _ in range(3):
        x, y = data(fabric)
        fabric.backward(F.mse_loss(model(x), y), model=model)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_scheduler_made_before_setup_drives_the_rate(strategy: str, world: int, precision: str) -> None:
    assert run(schedules, strategy, world, precision=precision) == pytest.approx([1 / 2, 1 / 3, 1 / 4])


def two_models(fabric: Fabric) -> tuple[list[float], list[float]]:
    """A generator and a critic, each with its optimizer; only one is trained on."""
    fabric.seed_everything(3)
    first, second = Mlp(), Mlp()
    a, opt_a = fabric.setup(first, torch.optim.SGD(first.parameters(), lr=0.1))
    b, opt_b = fabric.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
    x, y = data(fabric)
    before = [full(v).detach().clone() for m in (a, b) for v in m.state_dict().values()]
    fabric.backward(F.mse_loss(b(x), y), model=b)
    opt_b.step()
    opt_a.zero_grad()
    after = [full(v).detach().clone() for m in (a, b) for v in m.state_dict().values()]
    moved = [(p - q).abs().max().item() for p, q in zip(before, after, strict=True)]
    return moved[: len(moved) // 2], moved[len(moved) // 2 :]


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_two_models_stay_apart(strategy: str, world: int) -> None:
    still, moved = run(two_models, strategy, world)
    assert set(still) == {0.0}
    assert min(moved) > 0


# -- loss scaling ----------------------------------------------------------------------------------


def scales(fabric: Fabric) -> tuple[list[float], list[float], list[Tensor]]:
    """float16 mixed: an overflow on one rank skips the step on all and lowers the scale; then training goes on."""
    model, optimizer = setup(fabric, lr=0.01)
    LambdaLR(optimizer, lambda step: 1.0)  # patches `step`, as schedulers do
    scaler = fabric._running.scaler
    scale, norm = [], []
    for step in range(3):
        x, y = data(fabric)
        before = [full(v).detach().clone() for v in model.state_dict().values()]
        factor = math.inf if step == 0 and fabric.global_rank == fabric.world_size - 1 else 1e-3
        fabric.backward(F.mse_loss(model(x).float(), y) * factor, model=model)
        norm.append(fabric.clip_gradients(model, optimizer, max_norm=1e9).item())  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        scale.append(scaler.get_scale())
        same = all(torch.equal(full(a), b) for a, b in zip(model.state_dict().values(), before, strict=True))
        assert same == (step == 0)
    return scale, norm, [full(v).detach().clone() for v in model.state_dict().values()]


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[:-1])
def test_loss_scaling_agrees_on_all_ranks(strategy: str, world: int) -> None:
    scale, norm, _ = run(scales, strategy, world, precision="16-mixed")
    assert scale == [2.0**15] * 3
    assert not math.isfinite(norm[0])
    _, grads = plain_gradients(1e-3)
    assert norm[1] == pytest.approx(nn.utils.get_total_norm(grads).item(), rel=2**-8)  # sums of float16 products


def test_float16_true_scales_by_itself_under_deepspeed() -> None:
    losses = run(half_losses, "zero3", 2)
    assert losses[-1] < losses[0]


def half_losses(fabric: Fabric) -> list[float]:
    half = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(), devices=fabric.world_size, precision="16-true")
    model, optimizer = setup(half)
    losses = []
    for _ in range(24):  # the scale starts at 2**16 and must first come down
        x, y = data(half)
        loss = F.mse_loss(model(x).float(), y)
        half.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- traps that give wrong results silently --------------------------------------------------------


def optimizer_after_evaluation(fabric: Fabric) -> bool:
    fabric.seed_everything(3)
    model = fabric.setup(Mlp())
    x, y = data(fabric)
    with torch.no_grad():
        model(x)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
    before = full(model.state_dict()["scale"]).clone()
    fabric.backward(F.mse_loss(model(x), y))
    optimizer.step()
    return not torch.equal(full(model.state_dict()["scale"]), before)


def optimizer_of_the_original(fabric: Fabric) -> bool:
    """Through the variable the user had before, which no pane guards."""
    fabric.seed_everything(3)
    module = Mlp()
    model = fabric.setup(module)
    x, y = data(fabric)
    with torch.no_grad():
        model(x)
    gathered = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="belong to none"):
        fabric.setup_optimizers(gathered)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.1))
    before = full(model.state_dict()["scale"]).clone()
    fabric.backward(F.mse_loss(model(x), y))
    optimizer.step()
    return not torch.equal(full(model.state_dict()["scale"]), before)


def test_trap_1_through_the_original_variable() -> None:
    assert run(optimizer_of_the_original, "fsdp", 2)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_offload"])
def test_trap_1_the_root_stays_gathered_after_evaluation(strategy: str) -> None:
    assert run(optimizer_after_evaluation, strategy, 2)


def shards_differ(fabric: Fabric) -> bool:
    fabric.seed_everything(3)
    with fabric.init_module():
        module = nn.Linear(4, 8)
    mine = local(fabric.setup(module).weight).detach().clone()
    both = fabric.all_gather(mine)
    return not torch.equal(both[0], both[1])


def test_trap_5_ranks_do_not_draw_the_same_shard() -> None:
    assert run(shards_differ, "fsdp", 2)


def attention_biases(fabric: Fabric, eps: float) -> Tensor:
    """Query, key and value biases after some steps. The key's gradient is zero in exact arithmetic."""
    fabric.seed_everything(3)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2, eps=eps))
    replicas, index = fabric._running.sampler_shard()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(4, 5, 8, generator=generator).chunk(replicas)[index]
        fabric.backward(model(x).square().mean(), model=model)
        optimizer.step()
        optimizer.zero_grad()
    bias: Tensor = full(model.state_dict()["self_attn.in_proj_bias"]).detach().clone()
    return bias


def test_trap_7_a_small_eps_turns_noise_into_steps() -> None:
    """Why parity is tested with eps 1e-3: at 1e-8 two right runs differ where the gradient is noise, and only there."""
    calm = [run(attention_biases, s, w, 1e-3) for s, w in (("single_device", 1), ("fsdp", 2))]
    torch.testing.assert_close(*calm, rtol=1e-4, atol=1e-6)
    noisy = [run(attention_biases, s, w, 1e-12) for s, w in (("single_device", 1), ("fsdp", 2))]
    difference = (noisy[0] - noisy[1]).abs()
    assert difference[8:16].max() > 1e-4, "keys"
    assert difference[16:].max() < 1e-4, "values"


def unseeded(fabric: Fabric) -> tuple[bool, bool]:
    """Ranks that were seeded differently still hold one model: rank 0's."""
    torch.manual_seed(100 + fabric.global_rank)
    module = Mlp()
    module.register_buffer("noise", torch.randn(3))
    mine = [p.detach().clone() for p in module.parameters()]
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    state = [full(v).detach() for v in model.state_dict().values()]
    of_zero = fabric.broadcast(mine)
    names = [n for n, _ in Mlp().named_parameters()]
    equal = all(torch.equal(full(model.state_dict()[n]), w) for n, w in zip(names, of_zero, strict=True))
    everywhere = fabric.all_gather(torch.cat([v.flatten() for v in state]))
    return equal, all(torch.equal(everywhere[0], other) for other in everywhere)


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE[1:])
def test_all_ranks_hold_rank_zeros_model(strategy: str, world: int) -> None:
    assert run(unseeded, strategy, world) == (True, True)


# -- tensor parallel -------------------------------------------------------------------------------


def llama_losses(fabric: Fabric) -> list[float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    fabric.seed_everything(3)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    with fabric.init_module():
        module = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3))
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"
    generator = torch.Generator().manual_seed(0)
    replicas, index = fabric._running.sampler_shard()
    losses = []
    for _ in range(3):
        tokens = torch.randint(0, 64, (4, 6), generator=generator).chunk(replicas)[index]
        loss = model(input_ids=tokens, labels=tokens).loss
        fabric.backward(loss, model=model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


@pytest.mark.parametrize(("strategy", "world"), [("tp", 2), ("tp", 4), ("fsdp", 2), ("ddp", 2), ("zero3", 2)])
def test_a_hugging_face_model_carries_its_plan(strategy: str, world: int) -> None:
    assert run(llama_losses, strategy, world) == pytest.approx(run(llama_losses, "single_device", 1), rel=1e-5)


def own_function(module: nn.Module, mesh: Any) -> nn.Module:
    assert mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def test_parallelize_fn_and_explicit_plan_do_what_the_carried_plan_does() -> None:
    plan = {"blocks.*.up": "colwise", "blocks.*.down": RowwiseParallel()}
    results = []
    for extra in ({}, {"parallelize_fn": own_function}, {"plan": plan}):
        strategy = ModelParallelStrategy(start_method="forkserver", **extra)  # type: ignore[arg-type]
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        results.append(fabric.launch(clipped, {"max_norm": 0.01}))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def dropout_masks(fabric: Fabric) -> bool:
    torch.manual_seed(fabric.global_rank)
    fabric.setup(Mlp())
    both = fabric.all_gather(F.dropout(torch.ones(64)))
    return torch.equal(both[0], both[1])


def test_ranks_of_one_product_draw_the_same_dropout() -> None:
    assert run(dropout_masks, "tp", 2)


@pytest.mark.parametrize(
    ("world", "data_size", "tensor_size", "wanted"),
    [
        (1, "auto", "auto", (1, 1)),
        (2, "auto", "auto", (1, 2)),
        (4, "auto", "auto", (2, 2)),
        (8, "auto", "auto", (4, 2)),
        (8, "auto", 4, (2, 4)),
        (8, 2, "auto", (2, 4)),
        (6, 3, 2, (3, 2)),
    ],
)
def test_auto_never_means_tensor_parallel_over_everything(  # peers row 21
    world: int, data_size: Any, tensor_size: Any, wanted: tuple[int, int]
) -> None:
    config = ModelParallelStrategy(data_parallel_size=data_size, tensor_parallel_size=tensor_size)
    assert config.sizes(world) == wanted


# -- wrapping --------------------------------------------------------------------------------------


def test_the_repeated_block_is_found() -> None:
    gpt = tiny_gpt()
    assert [c.__name__ for c in repeated_blocks(gpt)] == ["Block"]
    assert wrap_units(gpt, None) == ["blocks.0", "blocks.1"]
    assert wrap_units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None) == []
    assert wrap_units(Mlp(), {nn.Linear}) == [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]
    assert wrap_units(Mlp(), lambda name, module: name.endswith("1")) == ["blocks.1"]


def test_a_hugging_face_model_says_its_blocks() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    assert "encoder.layer.1" in wrap_units(BertModel(config), None)


def test_nested_units_come_innermost_first() -> None:
    assert wrap_units(Mlp(), {nn.Linear, Mlp.Block})[:4] == [
        f"blocks.{i}.{n}" for i in range(2) for n in ("up", "down")
    ]
    assert wrap_units(Mlp(), {nn.Linear, Mlp.Block})[4:] == ["blocks.0", "blocks.1"]


def test_blocks_that_share_a_parameter_join_the_root() -> None:
    module = Mlp()
    module.blocks[1].up.weight = module.blocks[0].up.weight
    assert wrap_units(module, None) == []


def sharded_as_asked(fabric: Fabric) -> tuple[list[str], list[int]]:
    model = fabric.setup(Mlp())
    units = [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]
    return units, [local(p).numel() for p in model.parameters()]


def test_fsdp_shards_what_it_says() -> None:
    units, sizes = run(sharded_as_asked, "fsdp", 2)
    assert units == ["", "blocks.0", "blocks.1"]
    assert sum(sizes) == sum(p.numel() for p in Mlp().parameters()) // 2
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}, start_method="forkserver")
    units, _ = Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(sharded_as_asked)
    assert len(units) == 5


# -- the rest of DDP and friends -------------------------------------------------------------------


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def with_unused(fabric: Fabric) -> list[bool]:
    fabric.seed_everything(3)
    module = Sometimes()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for _ in range(2):
        x, y = data(fabric)
        fabric.backward(F.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    return [p.grad is None for p in model.parameters()]


def halve(state, bucket):  # type: ignore[no-untyped-def]  # torch wants these annotations exact, or none
    work = dist.all_reduce(bucket.buffer().div_(state["ranks"] * 2), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def with_hook(fabric: Fabric) -> Tensor:
    model, _ = setup(fabric)
    x, y = data(fabric)
    fabric.backward(F.mse_loss(model(x), y))
    return torch.cat([p.grad.flatten() for p in unwrap(model).parameters() if p.grad is not None])


def test_ddp_options_reach_ddp() -> None:
    unused = DDPStrategy(find_unused_parameters=True, start_method="forkserver")
    assert Fabric(accelerator="cpu", devices=2, strategy=unused).launch(with_unused) == [True] * 4
    hooked = DDPStrategy(ddp_comm_hook=halve, ddp_comm_state={"ranks": 2}, start_method="forkserver")
    halved = Fabric(accelerator="cpu", devices=2, strategy=hooked).launch(with_hook)
    torch.testing.assert_close(halved * 2, run(with_hook, "ddp", 2))


def frozen_teacher(fabric: Fabric) -> bool:
    fabric.seed_everything(3)
    teacher = fabric.setup(Mlp().requires_grad_(False))
    model, optimizer = setup(fabric)
    x, _ = data(fabric)
    fabric.backward(F.mse_loss(model(x) * 2, teacher(x)), model=model)
    optimizer.step()
    return torch.equal(full(teacher.state_dict()["scale"]), torch.ones(4))


@pytest.mark.parametrize(("strategy", "world"), EVERYWHERE)
def test_a_frozen_module_is_set_up_alone(strategy: str, world: int) -> None:
    assert run(frozen_teacher, strategy, world)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_module_built_outside_is_cast_and_one_built_inside_keeps_its_choice(precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    dtype = reference.DTYPES[precision]
    assert fabric.setup(Mlp()).scale.dtype == dtype
    with fabric.init_module():
        module = Mlp()
        module.register_buffer("table", torch.ones(3, dtype=torch.float32))
    model = fabric.setup(module)
    assert model.scale.dtype == dtype
    assert model.table.dtype == torch.float32, "its own code said float32"


def test_batch_norm_keeps_rank_zeros_statistics_under_every_strategy() -> None:
    results = [run(statistics, strategy, world) for strategy, world in (("ddp", 2), ("fsdp", 2), ("zero3", 2))]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def statistics(fabric: Fabric) -> Tensor:
    fabric.seed_everything(3)
    module = MODELS["conv"]()
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for seed in range(2):
        generator = torch.Generator().manual_seed(10 * seed + fabric.global_rank)
        fabric.backward(model(torch.randn(4, 1, 6, 6, generator=generator)).sum(), model=model)
    mean: Tensor = model.state_dict()["norm.running_mean"].clone()
    return mean


def test_strategy_is_the_users_config() -> None:  # scripts ask isinstance(fabric.strategy, FSDPStrategy)
    for config in (SingleDeviceStrategy(), DDPStrategy(), FSDPStrategy(cpu_offload=True), ModelParallelStrategy()):
        assert Fabric(accelerator="cpu", devices=1, strategy=config).strategy is config
        assert repr(config).startswith(type(config).__name__ + "(")
    assert isinstance(Fabric(accelerator="cpu", devices=1, strategy="fsdp2").strategy, FSDPStrategy)
    assert isinstance(Fabric(accelerator="cpu", devices=1).strategy, SingleDeviceStrategy)
    assert isinstance(Fabric(accelerator="cpu", devices=3).strategy, DDPStrategy)


def test_tied_model_trains_as_one_parameter_everywhere() -> None:
    for strategy, world in EVERYWHERE[1:]:
        assert run(stays_tied, strategy, world), strategy


def stays_tied(fabric: Fabric) -> bool:
    fabric.seed_everything(3)
    module = Tied()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x = torch.zeros(8, 5, dtype=torch.long)
    fabric.backward(model(x).square().mean(), model=model)
    optimizer.step()
    state = model.state_dict()
    return model.out.weight is model.embed.weight and torch.equal(
        full(state["out.weight"]), full(state["embed.weight"])
    )
