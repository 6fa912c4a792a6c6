"""What users name as a model: a module, a function that makes one, an import path."""

import copy
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fabriclite.errors import ConfigError, SetupOrderError
from fabriclite.module import FabricModule
from fabriclite.planning.inputs import Arguments, Inputs, guess, made_by
from fabriclite.planning.subject import Subject, default_loss
from fabriclite.strategies.wrapping import repeated_blocks
from fabriclite.strategy import StrategyConfig

Loss = Callable[[Any], Tensor]


@dataclass(slots=True)
class _Maker:
    """Makes a model whenever a trace asks, and knows of the last one how it is fed.

    Attributes:
        make: gives the model, or it with its inputs and loss.
        name: for people.
        said_inputs: by the user beside the model.
        said_loss: the same.
    """

    make: Callable[[], Any]
    name: str
    said_inputs: Any
    said_loss: Loss | None
    _inputs: Inputs | None = None
    _loss: Loss | None = None
    _blocks: frozenset[str] = frozenset()

    def build(self) -> nn.Module:
        made = self.make()
        model, *rest = made if isinstance(made, tuple) else (made,)
        if not isinstance(model, nn.Module) or len(rest) > 2:
            raise ConfigError(
                f"{self.name} must return a torch.nn.Module, (model, inputs) or (model, inputs, loss), but returned"
                f" {_kind(made)}."
            )
        inputs = self.said_inputs if self.said_inputs is not None or not rest else rest[0]
        self._inputs = guess(model) if inputs is None else made_by(inputs)
        self._loss = rest[1] if self.said_loss is None and len(rest) == 2 else self.said_loss
        _check_loss(self._loss)
        self._blocks = _blocks(model)
        return model

    def inputs(self, batch: int, sequence: int | None) -> Arguments:
        assert self._inputs is not None  # a model is made before it is fed
        return self._inputs(batch, sequence)

    def loss(self, output: Any) -> Tensor:
        return default_loss(output) if self._loss is None else self._loss(output)

    def build_of_blocks(self) -> nn.Module:
        model = self.build()
        if not self._blocks:
            raise ConfigError(
                f"`checkpointing` must be of a model with repeated blocks, but {self.name} has none. Leave it out."
            )
        return model

    def is_block(self, name: str, module: nn.Module) -> bool:
        return name in self._blocks


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be planned.

    Attributes:
        plain: keeps all activations.
        recomputing: with activation checkpointing of every repeated block.
    """

    plain: Subject
    recomputing: Subject


def model_of(model: object, inputs: Any = None, *, loss: Loss | None = None, name: str | None = None) -> Model:
    """From a module, or a function of no arguments that returns one, ``(model, inputs)`` or ``(model, inputs, loss)``.

    A module is not touched: a copy of it without memory is planned.

    Args:
        model: the module, on any device, also one that ``init_module`` recorded; or the function.
        inputs: arguments of the model, or a function ``(batch, sequence)`` that makes them; ``None`` guesses.
        loss: from the model's output to a tensor of one element.
        name: how the plan calls it.

    What a function returns, and what nothing says, is found when the model is made: a trace raises then.

    Raises:
        ConfigError: it is neither.
        SetupOrderError: the module was set up already.
    """
    if type(model) is FabricModule or _is_sharded(model):
        raise SetupOrderError(
            "`model` must be planned before `setup`, but was set up already. Plan first, or pass a function that makes"
            " the model."
        )
    _check_loss(loss)
    if isinstance(model, nn.Module):
        kept = _copied(model, "meta")  # as it is now, whatever becomes of it
        return _model(_Maker(lambda: _copied(kept, "cpu"), name or type(model).__name__, inputs, loss))
    if not callable(model):
        raise ConfigError(
            f"`model` must be a torch.nn.Module or a function that returns one, but is {type(model).__name__}."
        )
    called = str(getattr(model, "__name__", type(model).__name__))
    return _model(_Maker(model, name or ("model" if called == "<lambda>" else called), inputs, loss))


def _model(maker: _Maker) -> Model:
    plain = Subject(name=maker.name, build=maker.build, inputs=maker.inputs, loss=maker.loss)
    return Model(plain, replace(plain, build=maker.build_of_blocks, checkpointed=maker.is_block))


def _blocks(model: nn.Module) -> frozenset[str]:
    """Names of the repeated blocks, the outermost alone."""
    classes = tuple(repeated_blocks(model))
    names = [name for name, sub in model.named_modules() if name and type(sub) in classes]
    return frozenset(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def model_at(path: str, config: Mapping[str, Any]) -> Model:
    """From ``"package.module:Name"``, a class of modules or a function, called with ``config`` as its arguments.

    Raises:
        ConfigError: there is no such thing, or it does not take ``config``.
    """
    target = imported(path, "MODEL")
    if not callable(target):
        raise ConfigError(f"`MODEL` must name a class or a function, but {path!r} is {type(target).__name__}.")

    def make() -> Any:
        try:
            return target(**config)
        except TypeError as error:
            said = ", ".join(f"{key}={value!r}" for key, value in config.items())
            raise ConfigError(
                f"`--config` must hold the arguments of {path}, but {path}({said}) says: {error}."
            ) from error

    return model_of(make, name=path.partition(":")[2])


def imported(path: str, name: str) -> Any:
    """What ``package.module:Name`` names; modules beside the working directory are found too.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"`{name}` must be written package.module:Name, but is {path!r}.")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"`{name}` must name something that can be imported, but {path!r} cannot: {error}."
        ) from error
    return found


def parse_config(words: Sequence[str]) -> dict[str, Any]:
    """``--config``: a JSON file, JSON, or ``key=value`` words whose values are JSON where they can be, else text.

    Raises:
        ConfigError: one is none of them, or is no object of names.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier():
            found[key] = _json_or_text(value)
        else:
            found |= _object(word)
    return found


_NO_OBJECT: Final = "`--config` must be a JSON file, a JSON object or key=value, but"


def _object(word: str) -> dict[str, Any]:
    text = word if word.lstrip().startswith("{") else _file(word)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{_NO_OBJECT} {word!r} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{_NO_OBJECT} {word!r} holds {type(value).__name__}.")
    return value


def _file(word: str) -> str:
    if not Path(word).is_file():
        raise ConfigError(f"{_NO_OBJECT} is {word!r}, and there is no such file.")
    return Path(word).read_text(encoding="utf-8")


def configured(config: StrategyConfig, settings: Sequence[str]) -> StrategyConfig:
    """``config`` with ``key=value`` fields of its own, values in JSON where they can be.

    Raises:
        ConfigError: it has no such field, or the value has no meaning.
    """
    known = sorted(field.name for field in fields(config))  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"`--set` must be KEY=VALUE with a field of {type(config).__name__} ({', '.join(known)}), but is"
                f" {word!r}."
            )
        found = _json_or_text(value)
        values[key] = tuple(found) if isinstance(found, list) else found
    return replace(config, **values)  # type: ignore[type-var]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _check_loss(loss: object) -> None:
    if loss is not None and not callable(loss):
        raise ConfigError(f"`loss` must be a function of the model's output, but is {type(loss).__name__}.")


def _kind(made: object) -> str:
    return f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__


def _is_sharded(model: object) -> bool:
    return isinstance(model, nn.Module) and any(hasattr(p, "placements") for p in model.parameters())


def _copied(model: nn.Module, device: str) -> nn.Module:
    """A copy with new tensors on ``device``; nothing of the model is read."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).zero_()
        learned = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if learned else new
    return copy.deepcopy(model, memo)
