"""Running one step of a model that takes no memory, and writing down what it would take."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fabriclite import _torch
from fabriclite.errors import ConfigError
from fabriclite.planning import building
from fabriclite.planning.recorder import Recorder, hooked, rounding, step_of
from fabriclite.planning.subject import Subject, default_loss
from fabriclite.planning.trace import Mark, Optimizing, Step, Trace, Weight
from fabriclite.precision import Precision
from fabriclite.shards import local
from fabriclite.strategies._shared import in_precision
from fabriclite.strategy import StrategyConfig
from fabriclite.world import World

_AFTER_DROPOUT: Final = ("is_causal", "scale", "enable_gqa")
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def trace(
    subject: Subject,
    *,
    batch: int,
    sequence: int | None,
    precision: Precision,
    optimizer: MakeOptimizer,
    tensor: int = 1,
    config: StrategyConfig | None = None,
    device: str = "cpu",
) -> Trace:
    """One forward, backward and optimizer step of ``subject`` on tensors without memory.

    Where this torch has no support for ``device``, kernels of the CPU are traced: ``Trace.simulated`` says which.

    Args:
        subject: what is planned.
        batch: samples per rank and forward.
        sequence: length of a sample in tokens; ``None`` where it has none.
        precision: of the run.
        optimizer: makes it of parameters.
        tensor: ranks that share one matrix product.
        config: a strategy that says how they do; needed where ``tensor`` is more than one.
        device: type of the device that is planned for, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: something of ``subject`` cannot be planned.
    """
    _check_sizes(batch, sequence, tensor)
    simulated = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    place, fake, steps = torch.device(simulated), _torch.fake_mode(), {}
    with building.built(subject, precision, tensor, config, fake, place) as found:
        weights = _weights(found.module)
        buffers = sum({id(b): local(b).nbytes for b in found.module.buffers()}.values())
        _recompute(found.module, subject.recomputed(found.module))
        with fake:
            args, kwargs = building.fake_inputs(subject, batch, sequence, place)
            inputs = sum(leaf.nbytes for leaf in _torch.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            optimizing = _optimizing(found.module, optimizer, torch.device(device))
            for dtype in dict.fromkeys((precision.param_dtype, precision.compute_dtype)):
                if dtype != precision.param_dtype:
                    building.cast(found.module, _gathered_dtypes(found.module, dtype))
                for _ in range(1 if tensor == 1 else 2):  # DTensor asks of each operation once what its whole would be
                    steps[dtype] = _step(found.module, subject, args, kwargs, precision, simulated, device)
        return Trace(
            model=subject.name,
            batch=batch,
            sequence=sequence,
            precision=precision.name,
            tensor=tensor,
            device=device,
            simulated=simulated,
            weights=weights,
            buffers=buffers,
            building=found.building,
            inputs=inputs,
            steps=steps,
            optimizing=optimizing,
            skeleton=found.skeleton,
        )


def _check_sizes(batch: object, sequence: object, tensor: object) -> None:
    for name, value, optional in (("batch", batch, False), ("sequence", sequence, True), ("tensor", tensor, False)):
        if optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")


def _weights(module: nn.Module) -> tuple[Weight, ...]:
    return tuple(
        Weight(
            name=name,
            shape=tuple(local(param).shape),
            whole=param.numel(),
            dtype=param.dtype,
            trainable=param.requires_grad,
        )
        for name, param in module.named_parameters()
    )


def _gathered_dtypes(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What parameters are computed with where they are gathered in ``dtype``; those of BatchNorm stay float32."""
    kept = {id(p) for sub in module.modules() if _torch.is_batch_norm(sub) for p in sub.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name: dtype for name, p in named if p.dtype == torch.float32 and id(p) not in kept}


def _recompute(module: nn.Module, names: Iterable[str]) -> None:
    """Let the modules of these names keep their inputs alone, and compute again in backward."""
    from torch.utils.checkpoint import checkpoint

    for name in names:
        sub = module.get_submodule(name)
        forward = sub.forward

        def again(*args: Any, run: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        sub.forward = again


def _step(
    module: nn.Module, subject: Subject, args: Any, kwargs: Any, precision: Precision, simulated: str, device: str
) -> Step:
    recorder = Recorder(_wrappers(), rounding(device))
    for tensor in (*module.parameters(), *module.buffers(), *_torch.tree_leaves((args, kwargs))):
        if isinstance(tensor, Tensor):
            recorder.ignore(tensor)
    for param in module.parameters():
        param.grad = None
    module.train()
    loss_of = subject.loss or default_loss
    run = in_precision(module, World(rank=0, size=1, device=torch.device(simulated)), precision)
    with _explained(module), _attention(simulated, device), hooked(recorder, module), recorder:
        loss = loss_of(run(*args, **kwargs))
        _check_loss(loss)
        recorder.events.append(Mark("forward ends"))
        recorder.backward = True
        recorder.module = ""
        loss.backward()  # type: ignore[no-untyped-call]
        recorder.events.append(Mark("backward ends"))
    return step_of(recorder)


class _WithoutDropout(TorchFunctionMode):
    """Attention without dropout: the CPU's fused kernel has none, while that of CUDA draws it and keeps no mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, **dict(zip(_AFTER_DROPOUT, args[5:], strict=False)), "dropout_p": 0.0}
        return func(*args, **kwargs)


def _attention(simulated: str, device: str) -> AbstractContextManager[Any]:
    """Within it the CPU chooses the kind of attention kernel that ``device`` would."""
    return nullcontext() if simulated == device else _WithoutDropout()


@contextmanager
def _explained(module: nn.Module) -> Iterator[None]:
    """Say of what a model does not do without values that it is this that it cannot."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConfigError(
            f"{type(module).__name__} must run on tensors that have shapes but no values to be planned, but raised"
            f" {type(error).__name__}: {first} Choose by shapes, not by values, or plan another precision."
        ) from error


def _wrappers() -> tuple[type, ...]:
    from torch.distributed.tensor import DTensor

    return (DTensor, _torch.async_tensor())


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"`loss` must give one number that gradients flow from, but gives {what}. Reduce it, as by `.mean()`."
        )


def _optimizing(module: nn.Module, make: MakeOptimizer, device: torch.device) -> Optimizing:
    """What the optimizer takes, on tensors of ``device``: which decides whether it steps all parameters at once."""
    params = [nn.Parameter(_plain(param, device)) for param in module.parameters() if param.requires_grad]
    if not params:
        return Optimizing(like=0.0, other=0.0, fixed=0.0, temporary=0.0, together=0.0)
    elements = sum(param.numel() for param in params)
    optimizer, temporary = _stepped(params, make)
    whole = nn.Parameter(torch.empty(elements, dtype=params[0].dtype, device=device))
    like = other = fixed = 0
    for param in params:
        for state in _torch.tree_leaves(dict(optimizer.state.get(param, {}))):
            if not isinstance(state, Tensor):
                continue
            if state.numel() != param.numel() or param.numel() == 1:
                fixed += state.nbytes
            elif state.dtype == param.dtype:
                like += state.numel()
            else:
                other += state.nbytes
    return Optimizing(
        like=like / elements,
        other=other / elements,
        fixed=fixed / len(params),
        temporary=temporary / elements,
        together=_stepped([whole], make)[1] / elements,
    )


def _stepped(params: list[nn.Parameter], make: MakeOptimizer) -> tuple[Optimizer, float]:
    """An optimizer after its first step, and how many elements that held at most beside state and gradients."""
    optimizer = make(params)
    if params[0].device.type == "cuda":
        _torch.foreach(optimizer)
    recorder = Recorder((), 1)
    for param in params:
        param.grad = torch.empty_like(param)
        recorder.ignore(param)
        recorder.ignore(param.grad)
    with recorder:
        _run_step(optimizer)
    return optimizer, recorder.most_temporary() / params[0].dtype.itemsize


def _plain(param: nn.Parameter, device: torch.device) -> Tensor:
    return torch.empty(local(param).shape, dtype=param.dtype, device=device)


def _run_step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except TypeError as error:
        raise ConfigError(
            f"`optimizer` must step without a closure to be planned, but {type(optimizer).__name__} does not: {error}."
            " Plan with another, such as AdamW."
        ) from error
