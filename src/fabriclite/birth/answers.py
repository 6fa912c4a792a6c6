"""Answer what user code asks of a recorded tensor: where it is, and what it holds."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
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
_QUESTIONS: Final = frozenset(
    {*_WHERE, *_VALUES, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.__getitem__, Tensor.__setitem__, Tensor.new_tensor}
    | {Tensor.new, Tensor.untyped_storage, Tensor.data_ptr, Tensor.__deepcopy__}
)
"""What is answered here for recorded tensors; torch does all the rest."""
_SET_DATA: Final = Tensor.data.__set__  # type: ignore[attr-defined]
_UNBUILT: Final = (nn.UninitializedParameter, nn.UninitializedBuffer)


def _index(index: Any, device: torch.device) -> Any:
    """The same index with tensors for lists: torch would make those on the meta device, and lose their numbers."""
    if isinstance(index, tuple):
        return tuple(_index(item, device) for item in index)
    if isinstance(index, list) and all(isinstance(leaf, int) for leaf in flat(index)):
        return torch.tensor(index, device=device, dtype=None if index else torch.long)
    return index


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


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
        if func in _QUESTIONS:
            first = args[0] if args else None
            if isinstance(first, Tensor) and not isinstance(first, _UNBUILT) and self._recording.knows(first):
                answer = self._of(first, func, args, kwargs)
                if answer is not NotImplemented:
                    return self._handed_out(answer)
        elif func == _SET_DATA and self._recording.knows(args[0]) != self._recording.knows(args[1]):
            # a recorded tensor gets real memory, or an empty one, which is real, a recorded content
            return _torch.become(args[0], args[1])
        result = self._with_device(func, args, kwargs) if "device" in kwargs else self._call(func, args, kwargs)
        if not self._recorder.makes:
            self._refuse_computing(func, args, kwargs, result)
        return self._handed_out(result)

    def _with_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it where the user's code names a device, maybe the meta device."""
        if self._recording.knows(kwargs.get("out")):
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # it would have to be meta
        meant, wanted = self._recorder.meta_is_meant, kwargs.get("device")
        self._recorder.meta_is_meant = meant or (wanted is not None and torch.device(wanted).type == "meta")
        try:
            return self._call(func, args, kwargs)
        finally:
            self._recorder.meta_is_meant = meant

    def _handed_out(self, result: Any) -> Any:
        """Note that user code holds it now, maybe beside the module."""
        if isinstance(result, Tensor) and (number := self._recording.number(result)) is not None:
            self._recording.saw(number, result)
        return result

    def _of(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer to a question that torch would answer for a meta tensor."""
        if func in _WHERE:
            return _WHERE[func](self._recording.device(tensor))
        if func in _VALUES:
            return self._value(tensor, func, args[1:], kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            with self:  # a factory below has to ask us again
                return self._moved(tensor, func, args[1:], dict(kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(tensor, _index(args[1], self._recording.device(tensor)), *args[2:])
        if func is Tensor.untyped_storage and _torch.asked_by_typed_storage():  # it is saved or pickled
            return self._recording.value(tensor, shared=True).untyped_storage()
        if func is Tensor.data_ptr:
            return _torch.storage_key(tensor) + tensor.storage_offset() * tensor.element_size()
        if func is Tensor.__deepcopy__ and type(tensor) is Tensor:
            return self._copied(tensor, *args[1:])
        return self._made_like(tensor, func, args[1:], kwargs)

    def _value(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, shown = self._recording.value(tensor), func in (Tensor.__repr__, Tensor.__format__)
        with _torch.no_modes():
            value.requires_grad_(shown and tensor.is_leaf and tensor.requires_grad)
            answer = func(value, *args, **kwargs)
        if isinstance(answer, np.ndarray):
            self._recording.lend(tensor, value, answer)
        return answer

    def _made_like(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``new_tensor`` and ``new``, which would lose their data on the meta device."""
        here = self._recording.device(tensor)
        if func is Tensor.new_tensor:
            return torch.tensor(*args, **{"dtype": tensor.dtype, "device": here, **_given(kwargs)})
        if func is not Tensor.new:
            return NotImplemented
        if len(args) == 1 and not isinstance(args[0], int | torch.Size):
            return torch.tensor(args[0], dtype=tensor.dtype, device=here)
        return tensor.new_empty(args[0] if args and isinstance(args[0], torch.Size) else args)

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
            place = 3 if args and not isinstance(args[0], torch.dtype | Tensor) else 2  # to(device, dtype, wait, copy)
            copy = kwargs.pop("copy", args[place] if len(args) > place else False)
            args = args[:place]
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
        tensors = [t for t in flat([args, list(kwargs.values())]) if isinstance(t, Tensor)]
        recorded = [self._recording.knows(t) for t in tensors]
        mixed = any(recorded) and any(t.dim() > 0 and not known for t, known in zip(tensors, recorded, strict=True))
        if mixed and isinstance(result, Tensor) and result.requires_grad and not result.is_leaf:
            raise MaterializeError(
                f"A model from `init_module` must be set up before it computes, but {getattr(func, '__name__', func)}"
                " was called on it. Write model = fabric.setup(model) first, or fabric.materialize(model)."
            )
