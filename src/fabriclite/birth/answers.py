"""Answer what user code asks of a recorded tensor: where it is, and what it holds."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fabriclite import _torch
from fabriclite.birth.record import Recorder
from fabriclite.birth.replay import flat
from fabriclite.errors import MaterializeError

_WHERE: Final[dict[Any, Callable[[torch.device], Any]]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_meta.__get__: lambda device: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index or 0,
}
_VALUES: Final = frozenset(
    {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.nonzero, torch.nonzero}
    | {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__}
    | {Tensor.__format__, Tensor.__contains__, Tensor.__repr__}
)
_UNBUILT: Final = (nn.UninitializedParameter, nn.UninitializedBuffer)


class Answers(TorchFunctionMode):
    """Stands beside a :class:`Recorder`.

    Args:
        recorder: the one.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._recording = recorder.recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and not isinstance(first, _UNBUILT) and self._recording.knows(first):
            answer = self._of(first, func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        result = self._call(func, args, kwargs)
        if not self._recorder.makes:
            self._refuse_computing(func, args, kwargs, result)
        return result

    def _of(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer to a question that torch would answer for a meta tensor."""
        if func in _WHERE:
            return _WHERE[func](self._recording.device(tensor))
        if func in _VALUES:
            value = self._recording.value(tensor)
            with _torch.no_modes():
                return func(value, *args[1:], **kwargs)
        if func is Tensor.data_ptr:
            return _torch.storage_key(tensor) + tensor.storage_offset() * tensor.element_size()
        if func is Tensor.new_tensor:  # on meta it drops the data
            wanted = {"dtype": tensor.dtype, **{k: v for k, v in kwargs.items() if v is not None}}
            wanted.setdefault("device", self._recording.device(tensor))
            return torch.tensor(*args[1:], **wanted)
        if func is Tensor.__deepcopy__ and type(tensor) is Tensor:
            return self._copied(tensor, *args[1:])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            with self:  # a factory below has to ask us again
                return self._moved(tensor, func, args[1:], dict(kwargs))
        return NotImplemented

    def _moved(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``to``, ``cpu`` and ``cuda``: torch would compare with the meta device."""
        device: torch.device | None
        with _torch.raw():
            here, own = self._recording.device(tensor), tensor.dtype
        if func is Tensor.cpu:
            device, dtype, copy, layout = torch.device("cpu"), None, False, kwargs.get("memory_format")
        elif func is Tensor.cuda:
            which = args[0] if args else kwargs.get("device")
            device = torch.device("cuda" if which is None else which)
            dtype, copy, layout = None, False, kwargs.get("memory_format")
        else:
            copy = kwargs.pop("copy", args[3] if len(args) > 3 else False)
            args = args[:3]
            other = args[0] if args else kwargs.pop("other", None)
            if isinstance(other, Tensor):
                args = (other.device, other.dtype, *args[1:])
            device, dtype, layout = _torch.parse_to(*args, **kwargs)
        dtype = own if dtype is None else dtype
        layout_argument = {} if layout is None else {"memory_format": layout}
        if device is None or (device.type == here.type and device.index in (None, here.index)):
            with _torch.raw():
                return tensor.to(dtype, copy=copy, **layout_argument)
        with _torch.raw():
            return _torch.to_copy(tensor, dtype=dtype, device=device, **layout_argument)

    def _copied(self, tensor: Tensor, memo: dict[Any, Any]) -> Any:
        """A deep copy: of the whole storage, once, as other tensors of it are copied by the same ``memo``."""
        if id(tensor) in memo:
            return memo[id(tensor)]
        with _torch.raw():
            key = ("storage", _torch.storage_key(tensor))
            if key not in memo:
                itemsize = tensor.element_size()
                whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // itemsize,), (1,), 0)
                memo[key] = whole.clone()
            base = memo[key] if memo[key].dtype == tensor.dtype else memo[key].view(tensor.dtype)
            copy = base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return copy

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it; where torch wants a number and got a recorded tensor of one element, give its value."""
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            numbers = [t for t in flat([args, list(kwargs.values())]) if isinstance(t, Tensor) and self._is_number(t)]
            if not numbers:
                raise

        def real(value: Any) -> Any:
            if isinstance(value, Tensor) and self._is_number(value):
                return self._recording.value(value)
            return type(value)(real(v) for v in value) if type(value) in (list, tuple) else value

        return func(*real(args), **{name: real(value) for name, value in kwargs.items()})

    def _is_number(self, tensor: Tensor) -> bool:
        return tensor.dim() == 0 and self._recording.knows(tensor)

    def _refuse_computing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """After the context recorded tensors may be changed, not computed with: nobody would see the values."""
        if not isinstance(result, Tensor) or not result.requires_grad or result.is_leaf:
            return
        tensors = [t for t in flat([args, list(kwargs.values())]) if isinstance(t, Tensor)]
        if any(self._recording.knows(t) for t in tensors) and any(
            t.dim() > 0 and not self._recording.knows(t) for t in tensors
        ):
            raise MaterializeError(
                f"A model from `init_module` must be set up before it computes, but {getattr(func, '__name__', func)}"
                " was called on it. Write model = fabric.setup(model) first, or fabric.materialize(model)."
            )
