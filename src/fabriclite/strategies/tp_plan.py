"""A tensor-parallel plan: where it comes from, what its words mean, which modules it names."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)

from fabriclite.errors import ConfigError
from fabriclite.spread import Wrapped

STYLES: Final = (
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
    "sequence_parallel",
)


def style(word: object, pattern: str) -> ParallelStyle:
    """The torch style that ``word`` stands for.

    Raises:
        ConfigError: the word is unknown.
    """
    match word:
        case ParallelStyle():
            return word
        case "colwise":
            return ColwiseParallel()
        case "rowwise":
            return RowwiseParallel()
        case "colwise_gather_output" | "colwise_rep":
            return ColwiseParallel(output_layouts=Replicate())
        case "rowwise_split_input" | "rowwise_rep" | "embedding_rowwise":
            return RowwiseParallel(input_layouts=Replicate())
        case "sequence_parallel":
            return SequenceParallel()
    raise ConfigError(
        f"The style of {pattern!r} in a tensor-parallel plan must be a ParallelStyle or one of"
        f" {', '.join(STYLES)}, but is {word!r}."
    )


def expand(module: nn.Module, plan: Mapping[str, object]) -> dict[str, ParallelStyle]:
    """``{name: style}`` of the modules that ``plan`` names. ``*`` stands for one part of a dotted name.

    Raises:
        ConfigError: a pattern matches no module, or one that cannot be split, or two patterns match the same one.
    """
    names = [name for name, _ in module.named_modules() if name]
    found: dict[str, ParallelStyle] = {}
    chosen_by: dict[str, str] = {}
    for pattern, word in plan.items():
        matches = [name for name in names if _matches(name, pattern)]
        if not matches:
            raise ConfigError(
                f"Every pattern of a tensor-parallel plan must match a module of {type(module).__name__}, but"
                f" {pattern!r} matches none. Its modules include: {', '.join(names[:8]) or 'none'}."
            )
        for name in matches:
            if name in found:
                raise ConfigError(
                    f"Each module must get one style, but {name!r} is matched by {chosen_by[name]!r} and {pattern!r}."
                )
            found[name], chosen_by[name] = style(word, pattern), pattern
            _check_kind(name, module.get_submodule(name), found[name])
    return found


def _check_kind(name: str, module: nn.Module, chosen: ParallelStyle) -> None:
    """Raise if torch cannot split such a module; found on one device already."""
    if type(chosen) in (ColwiseParallel, RowwiseParallel) and not isinstance(module, nn.Linear | nn.Embedding):
        raise ConfigError(
            f"{type(chosen).__name__} must be given to a Linear or an Embedding, but {name!r} is"
            f" {type(module).__name__}. Name the layers inside of it, or leave it out of the plan."
        )


def carried_by(module: nn.Module) -> Mapping[str, object]:
    """The plan that ``module`` carries as ``_tp_plan`` (Hugging Face models do).

    Raises:
        ConfigError: it carries none.
    """
    plan = getattr(module, "_tp_plan", None)
    if not isinstance(plan, Mapping) or not plan:
        raise ConfigError(
            f"`plan` must be given for {type(module).__name__}, which carries no `_tp_plan` of its own, but is None."
            " Write ModelParallelStrategy(plan={'blocks.*.attn.wq': 'colwise', ...}) or pass parallelize_fn."
        )
    return plan


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def check_even(module: nn.Module, styles: Mapping[str, ParallelStyle], size: int) -> None:
    """Raise if a split is handed from one module to the next as plain tensors and does not come out even.

    Torch's styles pass local parts on by default, and guess the whole as ``size`` times the local part.

    Raises:
        ConfigError: a split dimension is no multiple of ``size``.
    """
    for name, chosen in styles.items():
        match module.get_submodule(name), chosen:
            case nn.Linear(out_features=width), ColwiseParallel(use_local_output=True, output_layouts=layouts):
                dim = "out_features"
            case nn.Linear(in_features=width), RowwiseParallel(input_layouts=layouts):
                dim = "in_features"
            case _:
                continue
        if any(layout.is_shard() for layout in layouts) and width % size:
            raise ConfigError(
                f"`{dim}` of {name} must be a multiple of tensor_parallel_size {size} to be split, but is {width}."
                " Leave it out of the plan, or gather its output ('colwise_gather_output')."
            )


def tied_names(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one object."""
    places: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def splits(module: nn.Module, styles: Mapping[str, ParallelStyle]) -> tuple[Wrapped, ...]:
    """What was split over tensor parallel: by style and class; where a function did it, by how parameters lie."""
    if styles:
        found = Counter((type(s).__name__, type(module.get_submodule(name)).__name__) for name, s in styles.items())
        return tuple(Wrapped(how=how, what=what, count=count) for (how, what), count in found.items())
    split = Counter(how for p in module.parameters() if (how := _split_of(p)))
    return tuple(Wrapped(how=f"split {how}", what="parameters", count=count) for how, count in split.items())


def _split_of(param: object) -> str:
    """How a parameter is cut over tensor parallel; ``""``: not at all."""
    if not isinstance(param, DTensor) or (param.device_mesh.mesh_dim_names or ("",))[-1] != "tensor_parallel":
        return ""
    return str(param.placements[-1]) if param.placements[-1].is_shard() else ""
