"""Which modules are gathered together under FSDP. Pure: looks at a module, changes nothing."""

from collections import Counter
from typing import Final

from torch import nn

from fabriclite.errors import ConfigError
from fabriclite.strategies.configs import WrapPolicy

_CONTAINERS: Final = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def wrap_units(module: nn.Module, policy: WrapPolicy) -> list[str]:
    """Names of the modules that each become a group, innermost first; what is left belongs to the root.

    Args:
        module: the root.
        policy: ``None`` finds the repeated block class; a set of classes; or ``predicate(name, module) -> bool``.

    Raises:
        ConfigError: a given policy matches nothing, or splits a shared parameter between two groups.
    """
    if policy is None:
        blocks = set(repeated_blocks(module))
        names = [name for name, m in module.named_modules() if name and type(m) in blocks]
        return _innermost_first(_without_split_ties(module, names))
    if isinstance(policy, set | frozenset):
        classes = tuple(policy)
        names = [name for name, m in module.named_modules() if name and isinstance(m, classes)]
        asked = ", ".join(sorted(c.__name__ for c in classes))
    else:
        names = [name for name, m in module.named_modules() if name and policy(name, m)]
        asked = "the predicate"
    if not names:
        found = ", ".join(sorted({type(m).__name__ for m in module.modules()}))
        raise ConfigError(
            f"`auto_wrap_policy` must match a submodule of {type(module).__name__}, but {asked} matches none."
            f" Its modules are: {found}."
        )
    split = set(names) - set(_without_split_ties(module, names))
    if split:
        raise ConfigError(
            f"`auto_wrap_policy` must keep shared parameters in one group, but {', '.join(sorted(split))} shares one"
            " with a module outside of it. Leave it out of the policy."
        )
    return _innermost_first(names)


def repeated_blocks(module: nn.Module) -> list[type[nn.Module]]:
    """Classes with submodules of their own that a container of ``module`` holds at least twice; outermost only."""
    declared = getattr(module, "_no_split_modules", None)  # what Hugging Face models say of themselves
    if declared:
        names = set(declared)
        return sorted({type(m) for m in module.modules() if type(m).__name__ in names}, key=lambda c: c.__name__)
    found: list[type[nn.Module]] = []
    _search(module, found)
    return found


def _search(module: nn.Module, found: list[type[nn.Module]]) -> None:
    if isinstance(module, _CONTAINERS):
        counts = Counter(type(child) for child in module.children() if _is_block(child))
        found.extend(cls for cls, count in counts.items() if count > 1 and cls not in found)
    for child in module.children():
        if type(child) not in found:
            _search(child, found)


def _is_block(module: nn.Module) -> bool:
    has_children = next(module.children(), None) is not None
    return has_children and not isinstance(module, _CONTAINERS) and next(module.parameters(), None) is not None


def _without_split_ties(module: nn.Module, names: list[str]) -> list[str]:
    """Leave out units that share a parameter with something outside of them: its two uses must be one group's."""
    places: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    shared = [users for users in places.values() if len(users) > 1]

    def splits(unit: str) -> bool:
        inside = [sum(name.startswith(f"{unit}.") for name in users) for users in shared]
        return any(0 < n < len(users) for n, users in zip(inside, shared, strict=True))

    return [name for name in names if not splits(name)]


def _innermost_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (-name.count("."), names.index(name)))
