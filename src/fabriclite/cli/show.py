"""A description of a checkpoint as text: a tree on a terminal, indented lines elsewhere."""

import sys

from fabriclite.checkpoint.describe import Description, GroupItem, Item, TensorItem


def show(described: Description, depth: int | None) -> None:
    """Print it, to ``depth`` levels of keys."""
    root = described.root if depth is None else described.root.cut(depth)
    title = f"{described.path}: {described.kind}, {_totals(described.root)}"
    if described.ranks is not None:
        title += f", saved by {_counted(described.ranks, 'process', 'processes')}"
    if not _print_tree(title, root):
        print(title)
        _print_lines(root, 1)
    print(_counted(len(described.files), "file", "files"))
    for name, size in described.files.items():
        print(f"  {name}  {_bytes(size)}")


def _line(name: str, item: Item) -> str:
    if isinstance(item, TensorItem):
        return f"{name}  {list(item.shape)} {item.dtype}, {_bytes(item.nbytes)}"
    if isinstance(item, GroupItem):
        return f"{name}  ({_totals(item)})" if item.tensors else name
    return f"{name} = {item.text}"


def _totals(group: GroupItem) -> str:
    return f"{_counted(group.tensors, 'tensor', 'tensors')}, {_bytes(group.nbytes)}"


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


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


def _print_tree(title: str, group: GroupItem) -> bool:
    """Print a tree, if there are a terminal and the package for it."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.text import Text
        from rich.tree import Tree
    except ImportError:
        return False

    def grow(branch: Tree, group: GroupItem) -> None:
        for name, item in group.items.items():
            grown = branch.add(Text(_line(name, item)))
            if isinstance(item, GroupItem):
                grow(grown, item)

    tree = Tree(Text(title))
    grow(tree, group)
    Console().print(tree)
    return True
