"""Files and folders, on this machine's file systems or, through fsspec, anywhere. Paths are ``pathlib``'s in both."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

from fabriclite.errors import ConfigError


def located(path: str | Path) -> Path:
    """``path`` as an object. One with a protocol (``s3://bucket/run``) is fsspec's, behind the same methods.

    Raises:
        ConfigError: it is no path, or the package for remote ones is missing.
    """
    if isinstance(path, str) and "://" in path:
        try:
            from upath import UPath
        except ImportError:
            raise ConfigError(
                f"`path` must be local without the package universal-pathlib, but is {path!r}."
                " Install fabriclite[remote]."
            ) from None
        return cast(Path, UPath(path))
    if hasattr(path, "fs"):
        return cast(Path, path)  # made by universal-pathlib already
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ConfigError(f"`path` must be a path, but is {path!r}. Example: 'runs/gpt/step-100'.")
    return path if isinstance(path, Path) else Path(path)


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def rename(old: Path, new: Path) -> None:
    """Give ``old`` another name, which nothing has. At once where the file system can."""
    if is_local(old):
        os.rename(old, new)
    else:
        remote: Any = old
        remote.fs.mv(remote.path, str(getattr(new, "path", new)), recursive=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        if is_local(path):
            shutil.rmtree(path)
        else:
            remote: Any = path
            remote.fs.rm(remote.path, recursive=True)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk when this returns. Remote stores do so by themselves."""
    if not is_local(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
