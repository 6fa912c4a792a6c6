"""Every private torch API that fabriclite uses: what for, and what replaces it when it goes.

Each was read in torch 2.11 and 2.13. Nothing else in the package touches an underscore of torch.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

# What a mode is told that an operation is.
from torch._ops import OpOverload as OpOverload
from torch.amp.grad_scaler import GradScaler

# A weak reference to a storage, which keeps its address from being used again.
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

# The public twin of these, torch.utils.pytree, came after 2.11.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.distributed.tensor import DTensor


def ddp_enter(ddp: DistributedDataParallel) -> Callable[[Any], Any]:
    """Do what ``ddp(...)`` does before its module's forward; the result does what it does after.

    ``DistributedDataParallel._pre_forward`` and ``_post_forward``; torch's own composable ``replicate`` uses both. The
    public way would be to run every method through ``ddp.forward``, which also runs buffers' collectives for methods
    that compute nothing.
    """
    ddp._pre_forward()  # type: ignore[no-untyped-call]
    return ddp._post_forward


def ddp_buffer_option(broadcast: bool) -> dict[str, Any]:
    """DDP's option for sending buffers before forward: ``broadcast_buffers`` until 2.12, then ``forward_sync_buffers``.

    Nothing private, but the one place that tells the versions apart; goes when 2.13 is the oldest torch supported.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": broadcast}


def ddp_bucket_bytes(ddp: DistributedDataParallel) -> list[int]:
    """Sizes of the buckets in which ``ddp`` sends gradients, in bytes: those it made anew after its first backward, if
    it has.

    ``DistributedDataParallel._get_ddp_logging_data``; nothing public tells them.
    """
    data = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes = data.get("rebuilt_bucket_sizes") or data.get("bucket_sizes") or ""
    return [int(size) for size in sizes.split(",") if size.strip()]


def fsdp_enter(module: Any) -> Callable[[Any], Any]:
    """Gather the root group as its forward does; the result does what comes after a forward.

    ``FSDPModule._get_fsdp_state()._pre_forward`` and ``_post_forward``. The public ``register_fsdp_forward_method``
    wraps a whole method in the two, also one that builds an optimizer and must see sharded parameters.
    """
    state = module._get_fsdp_state()
    state._pre_forward(module, (), {})
    return lambda output: state._post_forward(module, (), output)


def fsdp_make_root(module: Any) -> None:
    """Settle that ``module`` is the root, which FSDP2 otherwise finds by the first forward it sees.

    ``FSDPModule._get_fsdp_state()._lazy_init``. A user who first calls a block alone would make that block a root, and
    the model's own forward an error. No public way short of a forward.
    """
    module._get_fsdp_state()._lazy_init()


def enter_hooks_of(module: nn.Module, library: str) -> Callable[[Any], Any]:
    """Run the forward pre-hooks that ``library`` put on ``module``; the result runs its forward hooks on an output.

    ``nn.Module._forward_pre_hooks`` and ``_forward_hooks``. ZeRO-3 gathers a module's own parameters, and arranges
    their gathering in backward, in such hooks. The public way to run them is to call the module.
    """
    before, after = module._forward_pre_hooks, module._forward_hooks
    for key in [k for k, hook in before.items() if hook.__module__.startswith(library)]:
        before[key](module, (), *([{}] if key in module._forward_pre_hooks_with_kwargs else []))

    def finish(output: Any) -> Any:
        for key in [k for k, hook in after.items() if hook.__module__.startswith(library)]:
            changed = after[key](module, (), *([{}] if key in module._forward_hooks_with_kwargs else []), output)
            output = output if changed is None else changed
        return output

    return finish


def local_pieces_in_order(tensor: "DTensor") -> list[tuple[int, int]]:
    """``[(mesh dim, tensor dim)]`` of the cuts that made ``tensor``'s local part, outermost cut first.

    FSDP2 after tensor parallel on one tensor dim gives ``_StridedShard`` for the FSDP axis: that axis comes first in
    the mesh but cuts last. Told by class name: the class moved between modules from 2.11 to 2.13.
    """
    plain, strided = [], []
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement).__name__ == "_StridedShard":
            strided.append((mesh_dim, placement.dim))  # type: ignore[attr-defined]
        elif placement.is_shard():
            plain.append((mesh_dim, placement.dim))  # type: ignore[attr-defined]
    return plain + strided[::-1]


def shard_written(index: "MetadataIndex", file: str, offset: int, length: int) -> "WriteResult":
    """What a checkpoint's writer tells of a shard that lies in ``file``.

    ``torch.distributed.checkpoint.filesystem._StorageInfo``, which its index is pickled with. ``FileSystemWriter`` has
    no public way to write the files oneself.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    return WriteResult(index=index, size_in_bytes=length, storage_data=_StorageInfo(file, offset, length))


class LocalGradScaler(GradScaler):
    """A ``GradScaler`` that looks at the local part of sharded gradients and agrees with the other ranks.

    Overrides ``GradScaler._unscale_grads_`` (stable since 1.10; torch's ``ShardedGradScaler`` overrides it too) because
    torch's own mixes ``DTensor`` and plain gradients in one foreach call, which raises.

    Args:
        device: device type of the gradients.
        enabled: off, every method passes through.
        agree: makes a ``found_inf`` tensor of shape ``(1,)`` the maximum over all ranks, in place.
        local: the local part of a gradient.
    """

    def __init__(
        self, device: str, *, enabled: bool, agree: Callable[[Tensor], None], local: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(device, enabled=enabled)
        self._agree = agree
        self._local = local

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = self._local(param.grad)
                    grads.setdefault((grad.device, grad.dtype), []).append(grad)
        found = found_inf.clone().reshape(1)
        for (device, _), items in grads.items():
            here = found.to(device)
            torch._amp_foreach_non_finite_check_and_unscale_(items, here, inv_scale.to(device))
            found = torch.maximum(found, here.to(found.device))
        self._agree(found)
        return {found.device: found}


def foreach_norms(items: list[Tensor], norm_type: float, dtype: torch.dtype) -> list[Tensor]:
    """One norm per tensor in few kernels. ``torch.nn.utils.get_total_norm`` uses the same, but keeps bfloat16."""
    return list(torch._foreach_norm(items, norm_type, dtype=dtype))


def foreach_mul_(items: list[Tensor], factor: Tensor) -> None:
    """Scale every tensor in place in few kernels; so does ``torch.nn.utils.clip_grads_with_norm_``."""
    torch._foreach_mul_(items, factor)


def foreach_clamp_(items: list[Tensor], low: float, high: float) -> None:
    """Clamp every tensor in place in few kernels; so does ``torch.nn.utils.clip_grad_value_``."""
    torch._foreach_clamp_min_(items, low)
    torch._foreach_clamp_max_(items, high)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs ``module`` or a part of it.

    ``nn.Module._compiled_call_impl``, which ``nn.Module.compile()`` sets. No public way to ask.
    """
    return any(getattr(sub, "_compiled_call_impl", None) is not None for sub in module.modules())


def cpu_attention() -> Any:
    """``scaled_dot_product_attention`` as it is dispatched on the CPU, which torch's FLOP counter does not know.

    ``aten._scaled_dot_product_flash_attention_for_cpu``; goes when the counter counts it.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def compile_in_place(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, compiled in place with the same options; others as they are.

    ``OptimizedModule._orig_mod`` and ``dynamo_ctx`` hold module and options; ``nn.Module._compiled_call_impl`` is where
    the public ``nn.Module.compile`` puts its result. That method takes options, which the wrapper no longer tells.
    """
    inner, context = getattr(module, "_orig_mod", None), getattr(module, "dynamo_ctx", None)
    if not isinstance(inner, nn.Module) or context is None:
        return module
    inner._compiled_call_impl = context(inner._call_impl)
    return inner


# -- births: modes, storages, identity ---------------------------------------------------------------------------------


class DispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees every operation: documented for extending torch, in a module with an underscore.

    Torch wraps the handler of a subclass so that its compiler passes it by, and imports that compiler (1 s) at the
    first operation to do so. No compiler runs while a model is recorded.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def storage_key(tensor: Tensor) -> int:
    """The same for all tensors of one storage, while that lives: ``UntypedStorage._cdata``, its address in C++."""
    return int(tensor.untyped_storage()._cdata)


def untyped(storage: torch.TypedStorage | torch.UntypedStorage) -> torch.UntypedStorage:
    """The bytes below: ``TypedStorage._untyped_storage``. The public ``untyped`` warns that it is old, to the user."""
    return storage._untyped_storage if isinstance(storage, torch.TypedStorage) else storage


def version(tensor: Tensor) -> int:
    """Grows with every change in place: ``Tensor._version``; no public twin."""
    return int(tensor._version)


def raw() -> AbstractContextManager[None]:
    """Within it, attributes of tensors are what torch says, not what a function mode answers: ``DisableTorchFunction``.

    The public ``DisableTorchFunctionSubclass`` leaves modes on.
    """
    return torch._C.DisableTorchFunction()


@contextmanager
def no_modes() -> Iterator[None]:
    """Within it, no dispatch or function mode of anybody sees an operation.

    ``torch.utils._python_dispatch._disable_current_modes`` does the same for dispatch modes, and imports
    ``torch._dynamo`` (1 s) to do it.
    """
    with torch._C.DisableTorchFunction():
        if not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack():
            yield
            return
        taken = _take_modes()
        try:
            yield
        finally:
            _put_modes(*taken)


def put_below(dispatch: DispatchMode, function: TorchFunctionMode) -> None:
    """Put two modes under all others, where the end of nobody's ``with`` takes them away."""
    dispatch_modes, function_modes = _take_modes()
    _put_modes([dispatch, *dispatch_modes], [function, *function_modes])


def take_away(dispatch: DispatchMode, function: TorchFunctionMode) -> None:
    """Undo :func:`put_below`, whatever came since."""
    dispatch_modes, function_modes = _take_modes()
    _put_modes([m for m in dispatch_modes if m is not dispatch], [m for m in function_modes if m is not function])


def _take_modes() -> tuple[list[Any], list[Any]]:
    dispatch = [_python_dispatch._pop_mode() for _ in _python_dispatch._get_current_dispatch_mode_stack()]
    function = [torch.overrides._pop_mode() for _ in torch.overrides._get_current_function_mode_stack()]  # type: ignore[no-untyped-call]
    return dispatch[::-1], function[::-1]


def _put_modes(dispatch: list[Any], function: list[Any]) -> None:
    for mode in dispatch:
        _python_dispatch._push_mode(mode)
    for mode in function:
        torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]


def become(old: Tensor, new: Tensor) -> None:
    """Give the Python object ``old`` all that ``new`` is, and keep the object, its attributes and its hooks.

    ``torch._C._swap_tensor_impl``. The public ``torch.utils.swap_tensors`` refuses tensors that somebody else refers
    to weakly, as ``nn.RNN`` does its weights; ``old.data = new`` cannot leave the meta device.
    """
    hooks, after = old._backward_hooks, getattr(old, "_post_accumulate_grad_hooks", None)
    new = new.detach()
    if old.requires_grad and old.is_leaf and (new.is_floating_point() or new.is_complex()):
        new.requires_grad_(True)
    torch._C._swap_tensor_impl(old, new)
    if hooks:
        old._backward_hooks = hooks
    if after:
        old._post_accumulate_grad_hooks = after


def become_sharded(sharded: "DTensor", local: Tensor) -> None:
    """Give a sharded tensor on the meta device its local part, and keep the object.

    Like :func:`become`; ``DTensor._spec`` and ``_local_tensor``. The public ``torch.utils.swap_tensors`` refuses as
    there, and ``DTensor.from_local`` knows no shards of shards.
    """
    from torch.distributed.tensor import DTensor

    new = DTensor(local, sharded._spec, requires_grad=sharded.requires_grad)  # type: ignore[no-untyped-call]
    torch._C._swap_tensor_impl(sharded, new)
    sharded._local_tensor = local


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, Any]:
    """Device, dtype and memory format that the arguments of ``Tensor.to`` say: ``torch._C._nn._parse_to``."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, memory_format


def asked_by_typed_storage() -> bool:
    """Whether a caller a few frames up is ``Tensor._typed_storage``.

    So ``torch.save`` and ``pickle`` ask for a tensor's memory, and nobody who only compares addresses. No mode sees
    them save.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):
        if frame is None or frame.f_code is Tensor._typed_storage.__code__:
            return frame is not None
        frame = frame.f_back
    return False


def to_copy(tensor: Tensor, **options: Any) -> Tensor:
    """What ``Tensor.to`` runs when it has to copy: ``aten::_to_copy``. ``to`` itself would first compare devices."""
    return torch.ops.aten._to_copy.default(tensor, **options)  # type: ignore[no-any-return]


def trunc_normal_of_torch() -> Callable[..., Tensor]:
    """What ``torch.nn.init.trunc_normal_`` calls: ``torch.nn.init._no_grad_trunc_normal_``."""
    return nn.init._no_grad_trunc_normal_


@contextmanager
def replaced(trunc_normal: Callable[..., Tensor], before_rng_state: Callable[[], None]) -> Iterator[None]:
    """Within it, torch calls ``trunc_normal`` for its own, and ``before_rng_state`` before it gives a random state.

    ``torch.nn.init._no_grad_trunc_normal_`` cannot be seen by a mode and does nothing on meta tensors.
    ``get_rng_state`` (also where ``fork_rng`` finds it) asks the generator's own, which cannot be seen either.
    """

    def showing(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
            before_rng_state()
            return own(*args, **kwargs)

        return get_rng_state

    owners: list[Any] = [torch, torch.random, torch.cuda, torch.cuda.random]
    before = [(owner, "get_rng_state", owner.get_rng_state) for owner in owners]
    before.append((nn.init, "_no_grad_trunc_normal_", nn.init._no_grad_trunc_normal_))
    try:
        for owner in owners:
            owner.get_rng_state = showing(owner.get_rng_state)
        nn.init._no_grad_trunc_normal_ = trunc_normal
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


# -- planning: a step without memory -----------------------------------------------------------------------------------


def fake_mode() -> AbstractContextManager[Any]:
    """Within it every new tensor says it is on a device and takes no memory: ``torch._subclasses.FakeTensorMode``.

    No public twin. Plain tensors on the meta device would not choose kernels as those of a device do. Tensors that a
    model made before are let in.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def flop_formulas() -> dict[Any, Callable[..., Any]]:
    """Floating-point operations by operation: ``torch.utils.flop_counter.flop_registry``, public but not documented.

    Beside it what attention on a CPU takes, which has no formula there and the same cost as on CUDA.
    """
    from torch.utils import flop_counter

    found = dict(flop_counter.flop_registry)
    aten = torch.ops.aten
    forward = found[aten._scaled_dot_product_flash_attention]
    backward = found[aten._scaled_dot_product_flash_attention_backward]
    found.setdefault(aten._scaled_dot_product_flash_attention_for_cpu, forward)
    found.setdefault(aten._scaled_dot_product_flash_attention_for_cpu_backward, backward)
    return found


def fake_store() -> Any:
    """What a process group of the backend ``"fake"`` meets in: ``torch.testing._internal.distributed.fake_pg``.

    Importing it registers the backend, whose collectives do nothing. Torch's own tools for planning use it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@contextmanager
def other_default_group() -> Iterator[None]:
    """Within it there is no default process group, and another may be made; that and its parts are gone after it.

    ``torch.distributed.distributed_c10d._world`` and ``_update_default_pg``: torch knows one default group a process.
    Names of groups are counted, and the count is put back: ranks that do not come here count on from the same number.
    """
    from torch.distributed import distributed_c10d as c10d

    world: Any = c10d._world
    ours, known, count = world.default_pg, set(world.pg_names), world.group_count
    c10d._update_default_pg(None)
    try:
        yield
    finally:
        c10d._update_default_pg(ours)
        for group in [group for group in world.pg_names if group not in known]:
            c10d.destroy_process_group(group)
        world.group_count = count


def async_tensor() -> type:
    """What a functional collective gives before it is waited for: ``AsyncCollectiveTensor``; a tensor around one."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor


def is_batch_norm(module: nn.Module) -> bool:
    """``torch.nn.modules.batchnorm._BatchNorm``: the base of all of them, which has no public name."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let ``optimizer`` step all parameters at once, as it does by itself on CUDA: its groups' ``"foreach"``.

    Tensors that only say that they are on CUDA are of a class for which it would not.
    """
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
