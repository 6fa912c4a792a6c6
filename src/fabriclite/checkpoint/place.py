"""Where a checkpoint goes: beside its name while it is written, then in the place of the older one, in one step.

A name ``run/step-100`` can have three companions, each with a dot in front: ``.step-100.writing`` is not whole yet,
``.step-100.replaced`` is the older checkpoint while the new one takes its name, and ``.step-100.removing`` is on its
way out. Whenever the process is killed, the newest whole checkpoint is under the name or else the replaced one; the
others are cleared by the next save of that name or, with ``keep_last``, of the series.
"""

import os
import re
import zipfile
from pathlib import Path
from typing import Final

from fabriclite.checkpoint import disk
from fabriclite.checkpoint.sums import SUMS

META: Final = "meta.pt"
"""The file of a checkpoint folder that holds all but the shards."""
LATEST: Final = "latest"
"""The name that leads to the newest checkpoint of a series."""
_COMPANIONS: Final = ("writing", "replaced", "removing")


def companion(path: Path, kind: str) -> Path:
    """``.name.writing``, ``.name.replaced`` or ``.name.removing``."""
    return path.with_name(f".{path.name}.{kind}")


def beside(path: Path) -> Path:
    """Where to write what becomes ``path`` once it is whole."""
    return companion(path, "writing")


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a checkpoint folder."""
    return path.is_dir() and (path / META).is_file() and (path / ".metadata").is_file()


# -- before a save ----------------------------------------------------------------------------------------------------


def prepare(path: Path, linked: bool = False) -> None:
    """Make room beside ``path``, and clear what a save that was killed left there.

    Args:
        path: of what will be saved.
        linked: whether it is one of a series, and ``latest`` is to lead to it.

    Raises:
        FileExistsError: see :func:`check_replaceable`; or ``latest`` is no link.
        PermissionError: the older checkpoint could not be removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without `keep_last` it is no series: names alike may be those of other runs, which are writing now.
    for name in [path.name, LATEST, *(other.name for other in series(path) if linked)]:
        _tidy(path.with_name(name))
    check_replaceable(path)
    _check_removable(path)
    link = path.with_name(LATEST)
    if linked and link.exists() and _leads_to(link) is None:
        raise FileExistsError(f"{link} is no link to the newest checkpoint, and would be lost. Give it another name")


def _tidy(path: Path) -> None:
    replaced = companion(path, "replaced")
    if replaced.exists() and not path.exists():
        disk.rename(replaced, path)  # killed between the two renames of `publish`
    for kind in _COMPANIONS:
        disk.remove(companion(path, kind))


def check_replaceable(path: Path) -> None:
    """Raise if a new checkpoint at ``path`` would destroy something that is no checkpoint.

    Raises:
        FileExistsError: it would. A folder with anything else in it, or a file that torch did not write.
    """
    if not path.exists() or _is_checkpoint(path):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    kind = "folder" if path.is_dir() else "file"
    raise FileExistsError(
        f"{path} is a {kind} that holds more than a checkpoint, and would be lost. Save to another name"
    )


def _check_removable(path: Path) -> None:
    """Raise while all is as it was, and not when half of a folder is gone."""
    own = os.access in os.supports_effective_ids
    if disk.is_local(path) and path.is_dir() and not os.access(path, os.W_OK | os.X_OK, effective_ids=own):
        raise PermissionError(f"{path} is a folder that this user may not empty")


def _is_checkpoint(path: Path) -> bool:
    return _only_ours(path) or (path.is_file() and _torch_wrote(path))


def _only_ours(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    exported = {"config.json", "generation_config.json", "model.safetensors.index.json", SUMS}
    if SUMS in names and all(name in exported or name.endswith(".safetensors") for name in names):
        return True
    return is_folder(path) and all(name in (META, ".metadata", SUMS) or name.endswith(".distcp") for name in names)


def _torch_wrote(path: Path) -> bool:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())


# -- after it ---------------------------------------------------------------------------------------------------------


def publish(new: Path, path: Path) -> None:
    """Put ``new``, which is whole and on the disk, in the place of ``path``."""
    if new.is_file() and path.is_file() and disk.is_local(path):
        os.replace(new, path)
    else:
        if path.exists():
            disk.rename(path, companion(path, "replaced"))
        disk.rename(new, path)
    disk.sync(path.parent)  # before anything of the older one goes
    disk.remove(companion(path, "replaced"))


def point_latest(path: Path) -> None:
    """Let ``latest`` beside ``path`` lead to it, in one step."""
    link = path.with_name(LATEST)
    if not disk.is_local(path):
        link.write_text(path.name)
        return
    fresh = path.with_name(f".{LATEST}.writing")
    disk.remove(fresh)
    fresh.symlink_to(path.name)
    os.replace(fresh, link)
    disk.sync(path.parent)


def keep_newest(path: Path, count: int) -> None:
    """Of the series of ``path``, which was just saved, keep the newest ``count``.

    Never removed are ``path`` itself, and what holds more than a checkpoint.
    """
    others = sorted(filter(_is_checkpoint, series(path)), key=_age, reverse=True)
    for old in reversed(others[count - 1 :]):
        _check_removable(old)
        gone = companion(old, "removing")
        disk.rename(old, gone)  # so that no half of it is ever under its name
        disk.remove(gone)


def _age(path: Path) -> tuple[float, list[int]]:
    return path.stat().st_mtime, [int(number) for number in re.findall(r"\d+", path.name)]


def series(path: Path) -> list[Path]:
    """Paths beside ``path`` that differ from it in numbers only, also those of companions; ``path`` is not one."""
    if not re.search(r"\d", path.name) or not path.parent.is_dir():
        return []
    pattern = r"\d+".join(re.escape(piece) for piece in re.split(r"\d+", path.name))
    found = re.compile(rf"(?:({pattern})|\.({pattern})\.(?:{'|'.join(_COMPANIONS)}))")
    matches = (found.fullmatch(p.name) for p in path.parent.iterdir())
    names = {m[1] or m[2] for m in matches if m is not None}
    return [path.with_name(name) for name in sorted(names - {path.name})]


# -- for a load -------------------------------------------------------------------------------------------------------


def found(path: Path) -> Path:
    """Where the newest whole checkpoint of that name is: ``latest`` leads to another one."""
    if path.name == LATEST:
        path = path.parent / (_leads_to(path) or LATEST)
    replaced = companion(path, "replaced")
    return replaced if not path.exists() and replaced.exists() else path


def _leads_to(link: Path) -> str | None:
    """Where ``latest`` leads, seen from its folder; ``None`` if it is no link."""
    if disk.is_local(link) and link.is_symlink():
        return os.readlink(link)
    if link.is_file() and link.stat().st_size < 1024:
        return link.read_text()
    return None
