"""The walls of the house, read from the code: floors, owners, sizes. See docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fabriclite

SRC = Path(fabriclite.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
FLOORS = {
    0: ("errors", "precision", "world", "devices", "layout", "clock", "spelling", "spread", "_torch"),
    1: ("birth", "boxes", "shards", "stored", "stretch", "seed"),
    2: (
        "strategy",
        "agreement",
        "module_state",
        "callbacks",
        "collectives",
        "gradients",
        "optim",
        "optim_state",
        "data",
        "data_passes",
        "data_samplers",
        "checkpoint.parts",
        "launch",
        "environments",
    ),
    3: ("strategies", "module", "checkpoint"),
    4: ("registry", "arguments", "books", "checks", "entries", "preemption", "loggers", "planning", "watching"),
    5: ("fabric",),
    6: ("", "cli", "doctor", "__main__"),
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def floor_of(module: str) -> int:
    best = max(
        ((len(room), floor) for floor, rooms in FLOORS.items() for room in rooms if _inside(module, room)),
        default=None,
    )
    assert best is not None, f"{module} has no floor: give it one here and in docs/architecture.md"
    return best[1]


def _inside(module: str, room: str) -> bool:
    return module == room or (room != "" and module.startswith(f"{room}."))


def imports_of(tree: ast.AST) -> list[str]:
    """fabriclite modules that are imported, at the top or inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fabriclite":
            base = (node.module or "").removeprefix("fabriclite").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                is_module = (SRC / Path(*inner.split("."))).with_suffix(".py").exists()
                found.append(inner if is_module or (SRC / Path(*inner.split("."))).is_dir() else base)
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file: Path) -> None:
    here = name_of(file)
    for other in imports_of(ast.parse(file.read_text())):
        same_room = here.split(".")[0] == other.split(".")[0]
        builds = here == "strategies.configs" and other.startswith("strategies.")  # `build`, inside functions
        assert same_room or builds or floor_of(other) <= floor_of(here), f"{here} imports {other}, which is above it"


def test_no_module_cycles() -> None:
    graph = {name_of(f): {m for m in _top_imports(f) if m != name_of(f)} for f in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _top_imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    tops = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return imports_of(ast.Module(body=[n for n in tops if isinstance(n, ast.ImportFrom)], type_ignores=[]))


OWNERS = [
    ("os.environ", ("launch",)),
    ("set_default_dtype", ("birth",)),
    (".is_meta", ("birth",)),
    ("import deepspeed", ("strategies.deepspeed", "strategies._zero", "strategies._zero_state")),
    ("from deepspeed", ("strategies._zero", "strategies._zero_state", "strategies.deepspeed")),
    ("torch.load(", ("checkpoint",)),
    ("init_process_group", ("launch.process_group",)),
    ("partial(fully_shard", ("strategies._fully_shard",)),
    ("MixedPrecisionPolicy(", ("strategies._fully_shard",)),
    ("torch.autocast(", ("strategies._shared",)),
]


@pytest.mark.parametrize(("line", "rooms"), OWNERS, ids=[o[0] for o in OWNERS])
def test_a_line_is_in_its_room(line: str, rooms: tuple[str, ...]) -> None:
    holders = {name_of(f) for f in FILES if line in _code(f)}
    assert holders, f"nothing holds {line!r} any more: take it out of the table"
    assert all(any(_inside(holder, room) for room in rooms) for holder in holders), holders


def _code(file: Path) -> str:
    """The file without docstrings and comments."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def test_private_torch_is_named_in_one_file() -> None:
    allowed = {"strategies._fully_shard": {"_BatchNorm"}}
    for file in FILES:
        if name_of(file) == "_torch":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                text = ast.unparse(node)
                private = text.startswith(("torch.", "nn.", "dist.")) and node.attr not in allowed.get(
                    name_of(file), ()
                )
                assert not private, f"{name_of(file)}:{node.lineno} {text}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_short(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{file.name}:{node.lineno} {node.name}"


def test_strategies_are_final_and_flat() -> None:
    from fabriclite.strategies.ddp import DDP
    from fabriclite.strategies.deepspeed import DeepSpeed
    from fabriclite.strategies.fsdp import FSDP
    from fabriclite.strategies.single import SingleDevice
    from fabriclite.strategies.tensor_parallel import TensorParallel
    from fabriclite.strategy import Strategy

    for cls in (DDP, DeepSpeed, FSDP, SingleDevice, TensorParallel):
        assert cls.__bases__ == (Strategy,)
        assert getattr(cls, "__final__", False)


def test_importing_is_cheap() -> None:
    """DTensor alone takes 0.6 s; what a script does not use it does not pay for."""
    code = "import fabriclite, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "torch.distributed.tensor",
        "torch._dynamo",
        "deepspeed",
        "transformers",
        "tensorboard",
        "matplotlib",
        "wandb",
        "mlflow",
    ]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
