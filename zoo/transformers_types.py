"""Every transformers model type and the classes its auto mappings name, each tiny and with random weights."""

import logging
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.entry import MAX_PARAMETERS, Entry, NotBuildable, describe, size
from zoo.overrides import OVERRIDES
from zoo.shrink import SCHEMES, shrink

transformers.logging.set_verbosity(logging.CRITICAL)  # configs without their usual tokens warn, docstrings complain


def classes_by_type() -> dict[str, list[str]]:
    """Model type -> class names, the base model first, then heads in the mappings' order."""
    tables = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    tables.sort(key=lambda name: (name != "MODEL_MAPPING_NAMES", name))
    found: dict[str, list[str]] = {}
    for table in tables:
        for model_type, names in getattr(modeling_auto, table).items():
            known = found.setdefault(model_type, [])
            known += [n for n in ((names,) if isinstance(names, str) else names) if n not in known]
    return dict(sorted(found.items()))


def entries(all_classes: bool = False) -> Iterator[Entry]:
    """The zoo's transformers: each type's first class, or all of them. Imports no modelling code yet."""
    for model_type, names in classes_by_type().items():
        for name in names if all_classes else names[:1]:
            yield Entry("transformers", model_type, name, partial(build, model_type, name))


def build(model_type: str, class_name: str) -> nn.Module:
    """A tiny model. Raises `NotBuildable` where transformers itself cannot build it here."""
    config = deepcopy(tiny_config(model_type, class_name))  # models write into their config
    model: nn.Module = model_class(class_name)(config)
    return model


def model_class(name: str) -> Any:
    try:
        return getattr(transformers, name)
    except Exception as error:
        raise NotBuildable(describe(error)) from error


@cache
def tiny_config(model_type: str, class_name: str) -> PreTrainedConfig:
    """The config of the first scheme under which the class builds, and is small, on the meta device."""
    cls = model_class(class_name)
    default = _default_config(model_type, cls)
    reasons: list[str] = []
    for scheme in SCHEMES:
        try:
            config = shrink(default, scheme, OVERRIDES.get(model_type))
            count = size(partial(cls, deepcopy(config)))
        except Exception as error:
            reasons.append(describe(error))
            continue
        if count <= MAX_PARAMETERS:
            return config
        reasons.append(f"{count / 1e6:.0f} million parameters")
    raise NotBuildable("; ".join(dict.fromkeys(reasons)))


def _default_config(model_type: str, cls: Any) -> PreTrainedConfig:
    """The type's config, or, for a class that is only a part of its type, that part's."""
    try:
        config = CONFIG_MAPPING[model_type]()
        own = getattr(cls, "config_class", None)
        return config if own is None or isinstance(config, own) else own()
    except Exception as error:
        raise NotBuildable(f"default config: {describe(error)}") from error
