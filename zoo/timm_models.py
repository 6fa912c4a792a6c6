"""timm's architectures: the smallest of each family, or all of them."""

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from torch import nn

from zoo import torchvision_stub
from zoo.entry import Entry, NotBuildable, size

torchvision_stub.install()

import timm  # noqa: E402  (it imports torchvision at its top)

MAX_PARAMETERS = 60_000_000
IMAGE_SIZE = 64
# What names call their sizes, smallest first. A name without one lies in the middle.
_SIZES = (
    *("test", "zepto", "atto", "femto", "pico", "nano", "xxxt", "xxt", "xxs", "xt", "xs", "tiny", "mini", "micro", "t"),
    *("s", "small", "m", "medium", "b", "base", "l", "large", "xl", "xlarge", "xxl", "h", "huge", "g", "giant"),
    *("gigantic", "e", "enormous"),
)


def entries(all_models: bool = False) -> Iterator[Entry]:
    """The zoo's timm: for each family the two smallest architectures, going by their names, or all of them."""
    families: dict[tuple[str, str], list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            families.setdefault((module, _stem(name)), []).append(name)
    for (module, _), names in sorted(families.items()):
        for name in sorted(names) if all_models else sorted(names, key=_size)[:2]:
            yield Entry("timm", module, name, partial(build, name))


def build(name: str) -> nn.Module:
    """A fresh one with random weights. Raises `NotBuildable` where it is large, or timm cannot build it here."""
    make = partial(timm.create_model, name, pretrained=False, **_options(name))
    try:
        count = size(make)
    except Exception:  # some look at values while they are built: their size is only known afterwards
        count = 0
    if count > MAX_PARAMETERS:
        raise NotBuildable(f"{count / 1e6:.0f} million parameters")
    model: nn.Module = make()
    return model


@cache
def _options(name: str) -> dict[str, Any]:
    """A small image where the architecture takes its size as an argument."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size:
        return {}
    try:
        size(partial(timm.create_model, name, pretrained=False, img_size=IMAGE_SIZE))
    except Exception:  # not an argument, or windows that do not fit
        return {}
    return {"img_size": IMAGE_SIZE}


def _stem(name: str) -> str:
    return re.split(r"[_\d]", name, maxsplit=1)[0] + "".join(re.findall(r"v\d\b|v\d(?=_)", name)[:1])


def _size(name: str) -> tuple[int, int, str]:
    words = re.split(r"[_\d]+", name)
    known = [_SIZES.index(word) for word in words if word in _SIZES]
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    return (known[0] if known else _SIZES.index("small"), numbers[0] if numbers else 0, name)
