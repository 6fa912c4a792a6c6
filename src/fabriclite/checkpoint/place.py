"""Where a checkpoint goes, and what it may replace."""

import shutil
import zipfile
from pathlib import Path
from typing import Final

META: Final = "meta.pt"
"""The file of a checkpoint folder that holds all but the shards."""


def beside(path: Path) -> Path:
    """Where to write what becomes ``path`` once it is whole."""
    return path.with_name(f".{path.name}.writing")


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a checkpoint folder."""
    return path.is_dir() and (path / META).is_file() and (path / ".metadata").is_file()


def check_replaceable(path: Path) -> None:
    """Raise if a new checkpoint at ``path`` would destroy something that is no checkpoint.

    Raises:
        FileExistsError: it would. A folder with anything else in it, or a file that torch did not write.
    """
    if not path.exists() or _only_ours(path) or (path.is_file() and _torch_wrote(path)):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    kind = "folder" if path.is_dir() else "file"
    raise FileExistsError(
        f"{path} is a {kind} that holds more than a checkpoint, and would be lost. Save to another name"
    )


def _only_ours(path: Path) -> bool:
    ours = {META, ".metadata"}
    return is_folder(path) and all(p.name in ours or p.suffix == ".distcp" for p in path.iterdir())


def _torch_wrote(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def clear(path: Path) -> None:
    """Remove an older checkpoint of either form."""
    check_replaceable(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
