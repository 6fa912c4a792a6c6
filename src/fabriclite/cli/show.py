"""A description of a checkpoint as text: a tree on a terminal, indented lines elsewhere."""

import sys
from typing import Any

from fabriclite.checkpoint.describe import Description, GroupItem, Item, TensorItem


def show(described: Description, depth: int | None) -> None:
    """Print it, to ``depth`` levels of keys."""
    root = described.root if depth is None else described.root.cut(depth)
    tree = _on_terminal()
    print(f"{described.path}: {described.kind}, {_totals(described.root)}")
    if described.ranks is not None:
        print(f"saved by {described.ranks} {'process' if described.ranks == 1 else 'processes'}")
    if tree is None:
        _print_lines(root, 1)
    else:
        _grow(tree.root, root)
        tree.print()
    print(f"{len(described.files)} {'file' if len(described.files) == 1 else 'files'}")
    for name, size in described.files.items():
        print(f"  {name}  {_bytes(size)}")


def _line(name: str, item: Item) -> str:
    if isinstance(item, TensorItem):
        return f"{name}  {list(item.shape)} {item.dtype}, {_bytes(item.nbytes)}"
    if isinstance(item, GroupItem):
        return f"{name}  ({_totals(item)})" if item.tensors else name
    return f"{name} = {item.text}"


def _totals(group: GroupItem) -> str:
    return f"{group.tensors} {'tensor' if group.tensors == 1 else 'tensors'}, {_bytes(group.nbytes)}"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _print_lines(group: GroupItem, level: int) -> None:
    for name, item in group.items.items():
        print(f"{'  ' * level}{_line(name, item)}")
        if isinstance(item, GroupItem):
            _print_lines(item, level + 1)


class _Tree:
    """A tree of the package ``rich``."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.tree import Tree

        self._console = Console()
        self.root: Any = Tree("", hide_root=True)

    def print(self) -> None:
        self._console.print(self.root)


def _on_terminal() -> _Tree | None:
    if not sys.stdout.isatty():
        return None
    try:
        return _Tree()
    except ImportError:
        return None


def _grow(branch: Any, group: GroupItem) -> None:
    from rich.text import Text

    for name, item in group.items.items():
        grown = branch.add(Text(_line(name, item)))
        if isinstance(item, GroupItem):
            _grow(grown, item)
