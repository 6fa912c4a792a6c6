"""Pretrained weights: straight into shards under every strategy, and out again in the form that others open.

What is loaded is written by others: by transformers, huggingface_hub and torch. One world of processes does the checks
of several strategies; each check is a test that looks at what was found.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabriclite import CheckpointError, Fabric, LaunchError, Safetensors
from patterns import seed
from snapshots import bits_equal, whole
from test_births import agreed, problem_of
from worlds import STRATEGIES

SEED: Final = 7
THEIRS: Final = 123
"""Seed of what lies in files."""
PATIENCE: Final = timedelta(seconds=60)
TOKENS: Final = torch.arange(1, 13).view(2, 6)


class Small(nn.Module):
    """Something of each kind, and a plan to split it."""

    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 8, padding_idx=0)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 33, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(1) * 0.02 + 1)
        self.register_buffer("table", torch.rand(8))
        self.register_buffer("hidden", torch.rand(5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(tokens)).relu()) * self.scale + self.table)


class Tall(nn.Module):
    """Tensors that are large beside what else a process reads."""

    _tp_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self, rows: int = 4096, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Large(nn.Module):
    """200 MB, in twelve tensors."""

    _tp_plan: ClassVar[dict[str, str]] = {"layers.*": "colwise"}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(12))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=67, max_position_embeddings=20, **sizes))


def bert_classifier() -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(bert().config)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = LlamaConfig(
        vocab_size=66, num_key_value_heads=2, max_position_embeddings=20, tie_word_embeddings=True, **sizes
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=66, n_embd=16, n_layer=2, n_head=2, n_positions=20))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=66, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config)


ZOO: Final[dict[str, Callable[[], Any]]] = {"bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5}
BERT_PLAN: Final = {
    "bert.encoder.layer.*.attention.self.query": "colwise",
    "bert.encoder.layer.*.attention.self.key": "colwise",
    "bert.encoder.layer.*.attention.self.value": "colwise",
    "bert.encoder.layer.*.attention.output.dense": "rowwise",
    "bert.encoder.layer.*.intermediate.dense": "colwise",
    "bert.encoder.layer.*.output.dense": "rowwise",
}
"""BERT has no plan of its own."""


def built(build: Callable[[], nn.Module], number: int = SEED) -> Any:
    """By plain construction."""
    seed(number)
    return build()


def recorded(fabric: Fabric, build: Callable[[], nn.Module] = Small, empty_init: bool | None = True) -> Any:
    seed(SEED)
    with fabric.init_module(empty_init=empty_init):
        return build()


def set_up(fabric: Fabric, module: nn.Module) -> Any:
    """Alone where the strategy can, else with an optimizer."""
    if not type(fabric.strategy).__name__.startswith("DeepSpeed"):
        return fabric.setup(module)
    trainable = [p for p in module.parameters() if p.requires_grad]
    return fabric.setup(module, torch.optim.SGD(trainable, lr=0.1))[0]


def values(model: Any) -> dict[str, Tensor]:
    """Whole parameters and buffers by name. Every rank must call this."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: whole(tensor) for name, tensor in named}


def unlike(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], what: str = "") -> list[str]:
    """Names whose bits differ, or that only one side has."""
    bad = [n for n in expected if n not in actual or expected[n].dtype != actual[n].dtype]
    bad += [n for n in expected if n not in bad and not bits_equal(expected[n], actual[n])]
    return [f"{what}: {name}" for name in (*bad, *(n for n in actual if n not in expected))]


def untied(module: Any, model: Any) -> list[str]:
    """Groups of names that are one tensor in ``module`` and not in ``model``."""

    def groups(of: Any) -> set[frozenset[str]]:
        found: dict[int, set[str]] = {}
        for name, param in of.named_parameters(remove_duplicate=False):
            found.setdefault(id(param), set()).add(name)
        return {frozenset(names) for names in found.values() if len(names) > 1}

    return [f"not tied alike: {sorted(names)}" for names in groups(module) ^ groups(model)]


# -- files that others wrote -------------------------------------------------------------------------------------------


def write_all(folder: Path) -> None:
    """Every form of :class:`Small`, of another seed, and the models of the zoo."""
    from huggingface_hub import save_torch_state_dict

    module = built(Small, THEIRS)
    state = module.state_dict()
    once = {name: value for name, value in state.items() if name != "head.weight"}
    save_file(once, folder / "small.safetensors", metadata={"format": "pt"})
    for name, safe, size in (
        ("whole", True, "1GB"),
        ("sharded", True, 800),
        ("bin", False, 800),
        ("bin1", False, "1GB"),
    ):
        (folder / name).mkdir()
        save_torch_state_dict(state, folder / name, safe_serialization=safe, max_shard_size=size)
    assert len([*(folder / "sharded").glob("*.safetensors")]) > 2
    assert len([*(folder / "bin").glob("*.bin")]) > 2
    torch.save(state, folder / "small.pt")
    torch.save({"model": state, "step": 3}, folder / "nested.bin")
    fabric = one()
    model = fabric.setup(module)
    fabric.save(folder / "own_folder", {"model": model}, format="folder")
    fabric.save(folder / "own_file", {"model": model}, format="file")
    fabric.save(folder / "exported", {"model": model}, format="safetensors")
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, folder / "zeros.pt")
    save_file(built(Tall, THEIRS).state_dict(), folder / "tall.safetensors")
    save_file(
        {f"layers.{i}.weight": torch.full((2048, 2048), float(i)) for i in range(12)}, folder / "large.safetensors"
    )
    for name, build in ZOO.items():
        built(build, THEIRS).save_pretrained(folder / name, max_shard_size="10KB" if name == "gpt2" else "1GB")


FORMS: Final = (
    "small.safetensors",
    "whole",
    "sharded",
    "bin",
    "bin1",
    "small.pt",
    "nested.bin",
    "own_folder",
    "own_file",
    "exported",
)


def one(strategy: str = "single_device", **arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", strategy=STRATEGIES[strategy], devices=1, **arguments)


def beside(fabric: Fabric, **changes: Any) -> Fabric:
    """Another fabric in the world of this one."""
    arguments: dict[str, Any] = {"strategy": fabric.strategy, "precision": fabric.precision.name, **changes}
    return Fabric(accelerator="cpu", devices=fabric.world_size, **arguments)


def theirs(name: str, folder: Path, **how: Any) -> Any:
    """As transformers loads it."""
    return type(ZOO[name]()).from_pretrained(folder / name, **how)


# -- checks that run on every rank of a world --------------------------------------------------------------------------


def every_form(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Before setup: noted, and read by it. The rest is as plain construction makes it."""
    expected = values(built(Small)) | values(built(Small, THEIRS))
    expected["hidden"] = built(Small).hidden
    problems = []
    for form in FORMS if strategy in ("single_device", "fsdp") else FORMS[2:9:2]:
        module = recorded(fabric)
        report = fabric.load_raw(folder / form, module)
        problems += [] if set(report.loaded) == set(module.state_dict()) else [f"{form}: {report}"]
        problems += unlike(expected, values(set_up(fabric, module)), form)
    return problems


def after_setup(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    expected, problems = built(Small, THEIRS).state_dict(), []
    model = set_up(fabric, recorded(fabric))
    for form in FORMS:
        fabric.load_raw(folder / "zeros.pt", model)
        report = fabric.load_raw(folder / form, model)
        problems += [] if set(report.loaded) == set(expected) else [f"{form}: {report}"]
        actual = values(model)
        problems += unlike(expected, {name: actual[name] for name in expected}, form)
    fabric.verify(model)
    return problems


def built_for_real(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """A module that was never recorded, before setup and without it."""
    expected = {**values(built(Small, THEIRS)), "hidden": built(Small).hidden}
    module = built(Small)
    fabric.load_raw(folder / "sharded", module)
    problems = unlike(expected, values(module), "without setup")
    return problems + unlike(expected, values(set_up(fabric, module)), "before setup")


def prepared(module: Any, strategy: str) -> Any:
    """With a plan, if it has to have one."""
    if strategy == "tp" and "Bert" in type(module).__name__:
        module._tp_plan = BERT_PLAN
    return module


def names_for(strategy: str) -> list[str]:
    return {"single_device": [*ZOO], "zero1": ["llama"]}.get(strategy, ["bert", "llama"])


def like_transformers(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Recorded from its config, loaded and set up: what ``from_pretrained`` gives, ties and tables included."""
    problems = []
    for name in names_for(strategy):
        reference = theirs(name, folder)
        module = prepared(recorded(fabric, ZOO[name]), strategy)
        report = fabric.load_raw(folder / name, module)
        model = set_up(fabric, module)
        fabric.verify(model)
        problems += unlike(values(reference), values(model), name) + untied(reference, model)
        problems += [f"{name}: {report}"] if report.initialized or report.ignored or report.converted else []
    return problems


def in_bfloat16(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    half, problems = beside(fabric, precision="bf16-true"), []
    for name in ("bert", "llama"):
        expected = values(theirs(name, folder, dtype=torch.bfloat16))
        module = prepared(recorded(half, ZOO[name]), strategy)
        report = half.load_raw(folder / name, module)
        model = set_up(half, module)
        problems += unlike(expected, values(model), f"{name} before setup")
        problems += [] if set(report.converted.values()) == {torch.float32} else [f"{name}: {report.converted}"]
    return problems


def steps_from_there(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """What is loaded after setup, and after a step, is what the next step begins from: also under float32 masters."""
    problems = []
    for precision in ("32-true", "bf16-true"):
        here = beside(fabric, precision=precision)
        module = recorded(here, llama)
        model, optimizer = here.setup(module, torch.optim.SGD(module.parameters(), lr=0.0))
        for load in (False, True):
            if load:
                here.load_raw(folder / "llama", model)
            here.backward(model(TOKENS, labels=TOKENS).loss, model=model)
            optimizer.step()
            optimizer.zero_grad()
        expected = values(theirs("llama", folder, dtype=here.precision.param_dtype))
        problems += unlike(expected, values(model), precision)
    return problems


def changed_before_setup(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """After loading: resized, copied, written to, loaded again."""
    reference = theirs("llama", folder)
    seed(SEED)
    reference.resize_token_embeddings(70)
    module = recorded(fabric, llama)
    fabric.load_raw(folder / "llama", module)
    seed(SEED)
    module.resize_token_embeddings(70)
    model = set_up(fabric, module)
    problems = unlike(values(reference), values(model), "resized") + untied(reference, model)
    expected = {**values(built(Small, THEIRS)), "hidden": built(Small).hidden}
    module = recorded(fabric)
    fabric.load_raw(folder / "zeros.pt", module)
    fabric.load_raw(folder / "sharded", module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for state in (expected_other := {name: value.clone() for name, value in expected.items()}, other.state_dict()):
            state["up.weight"].mul_(2)
            state["table"][2:4] = 5
    problems += unlike(expected, values(set_up(fabric, module)), "loaded twice")
    return problems + unlike(expected_other, values(set_up(fabric, other)), "a changed copy")


def apart(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Rank 0's files are the model's, also where other ranks load something else, or nothing."""
    expected = {**values(built(Small, THEIRS)), "hidden": built(Small).hidden}
    problems = []
    for others in (None, "zeros.pt"):
        module = recorded(fabric)
        form = "whole" if fabric.is_global_zero else others
        if form is not None:
            fabric.load_raw(folder / form, module)
        problems += unlike(expected, values(set_up(fabric, module)), f"others load {others}")
    model = set_up(fabric, recorded(fabric))
    missing = folder / ("whole" if fabric.is_global_zero else "nowhere")
    problems += refused("one rank lacks it", lambda: fabric.load_raw(missing, model), "nowhere")
    return problems + unlike(values(built(Small)), values(model), "after the error")


def gone_by_then(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """A file that is removed after it was loaded, and before setup reads it."""
    problems = []
    for form, build in (("small.pt", Small), ("small.safetensors", Small), ("tall.safetensors", Tall)):
        expected = {**values(built(build, THEIRS)), **({"hidden": built(Small).hidden} if build is Small else {})}
        path = Path(shutil.copy(folder / form, folder / f"{os.getpid()}-{form}"))
        module = recorded(fabric, build)
        fabric.load_raw(path, module)
        path.unlink()
        problems += unlike(expected, values(set_up(fabric, module)), form)
    return problems


def some_missing(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """What the file lacks has the values of plain construction at that seed, which draws nothing for the rest."""
    own, state = built(Small), built(Small, THEIRS).state_dict()
    problems = []
    lacking = ("up.weight", "table", "scale", "norm.running_mean")
    path = folder / f"lacking-{os.getpid()}.safetensors"
    kept = {name: value.clone() for name, value in state.items() if name not in (*lacking, "head.weight")}
    save_file({**kept, "odd": torch.ones(2), "down.bias": kept["down.bias"].double()}, path)
    for late in (False, True):
        module = recorded(fabric)
        model = set_up(fabric, module) if late else module
        report = fabric.load_raw(path, model, strict=False)
        model = model if late else set_up(fabric, model)
        problems += unlike({**values(own), **kept, "head.weight": state["head.weight"]}, values(model), f"late {late}")
        seen = (set(report.loaded), set(report.initialized), report.ignored, dict(report.converted))
        if seen != ({*kept, "head.weight"}, set(lacking), ("odd",), {"down.bias": torch.float64}):
            problems.append(f"late {late}: {report} {seen}")
        if any(name not in str(report) for name in (*lacking, "odd")):
            problems.append(f"the report does not say so: {report}")
    return problems


def refused(what: str, act: Callable[[], object], *parts: str) -> list[str]:
    try:
        act()
    except CheckpointError as error:
        return [f"{what}: {part!r} is not in: {error}" for part in parts if part not in str(error)]
    return [f"{what}: nothing was raised"]


def nothing_changes(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """After an error, which names everything that is wrong."""
    state = built(Small, THEIRS).state_dict()
    kept = {name: value for name, value in state.items() if name not in ("up.weight", "table")}
    files = {
        "names": {**kept, "one": torch.ones(1), "two": torch.ones(1)},
        "shapes": {**state, "up.bias": torch.ones(3), "down.weight": torch.ones(2, 2)},
        "apart": {**state, "head.weight": torch.ones(33, 8)},
    }
    paths = {name: folder / f"{name}-{os.getpid()}.pt" for name in files}
    for name, content in files.items():
        torch.save(content, paths[name])
    wanted = {
        "names": ("up.weight", "table", "one", "two", "strict=False"),
        "shapes": ("up.bias", "(3,)", "(20,)", "down.weight", "(2, 2)", "(8, 20)"),
        "apart": ("embed.weight", "head.weight", "differ"),
    }
    expected, problems = values(built(Small)), []
    for late in (False, True):
        module = recorded(fabric)
        model = set_up(fabric, module) if late else module
        for name, path in paths.items():
            problems += refused(name, lambda model=model, path=path: fabric.load_raw(path, model), *wanted[name])
        for name in ("shapes", "apart"):
            act = lambda model=model, path=paths[name]: fabric.load_raw(path, model, strict=False)  # noqa: E731
            problems += refused(name, act, *wanted[name])
        problems += refused("nowhere", lambda model=model: fabric.load_raw(folder / "nowhere", model), "nowhere")
        act = lambda model=model: fabric.load_raw(folder / "small.pt", model, rename=lambda _: "up.weight")  # noqa: E731
        problems += refused("clash", act, "up.weight", "rename")
        model = model if late else set_up(fabric, model)
        problems += unlike(expected, values(model), f"late {late}")
    return problems


def other_names(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Patterns, in order, or a function; of a tied tensor one name, the other, or both."""
    state = built(Small, THEIRS).state_dict()
    expected, problems = {**values(built(Small, THEIRS)), "hidden": built(Small).hidden}, []
    both = {f"old.model.{name}": value for name, value in state.items()}
    contents: dict[str, tuple[dict[str, Tensor], Any]] = {
        "patterns": (both, {r"^old\.": "new.", r"^new\.(model\.)?": ""}),
        "function": (both, lambda name: name.removeprefix("old.model.")),
        "one name": ({n: v for n, v in both.items() if "embed" not in n}, {r"^old\.model\.": ""}),
        "the other": ({n: v for n, v in both.items() if "head" not in n}, {r"^old\.model\.": ""}),
        "other dtypes": ({n: v.double() for n, v in state.items() if v.is_floating_point()}, None),
    }
    for what, (content, rename) in contents.items():
        path = folder / f"{what}-{os.getpid()}.pt"
        torch.save(content, path)
        for late in (False, True):
            module = recorded(fabric)
            model = set_up(fabric, module) if late else module
            fabric.load_raw(path, model, rename=rename, strict="dtypes" not in what)
            model = model if late else set_up(fabric, model)
            problems += unlike(expected, values(model), f"{what}, late {late}") + untied(built(Small), model)
    return problems


def from_pretrained(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Called inside ``init_module`` it is what it is outside."""
    problems = []
    for name in names_for(strategy):
        reference = theirs(name, folder)
        for empty_init in (None, True) if name == "llama" else (True,):
            module = prepared(recorded(fabric, lambda name=name: theirs(name, folder), empty_init), strategy)
            model = set_up(fabric, module)
            fabric.verify(model)
            problems += unlike(values(reference), values(model), f"{name} {empty_init}") + untied(reference, model)
    return problems


def from_pretrained_half(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    half, problems = beside(fabric, precision="bf16-true"), []
    for name in names_for(strategy)[:2]:
        reference = theirs(name, folder, dtype=torch.bfloat16)
        load = lambda name=name: theirs(name, folder, dtype=torch.bfloat16)  # noqa: E731
        model = set_up(half, prepared(recorded(half, load), strategy))
        problems += unlike(values(reference), values(model), name)
    return problems


def with_a_new_head(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """``from_pretrained`` draws what the file lacks as it does outside, on every rank the same."""
    from transformers import BertForSequenceClassification

    load = lambda: BertForSequenceClassification.from_pretrained(folder / "bert")  # noqa: E731
    reference, problems = values(built(load)), []
    for empty_init in (None, True):
        model = set_up(fabric, prepared(recorded(fabric, load, empty_init), strategy))
        fabric.verify(model)
        problems += unlike(reference, values(model), str(empty_init))
    own = values(built(bert_classifier))
    module = prepared(recorded(fabric, bert_classifier), strategy)
    report = fabric.load_raw(folder / "bert", module, strict=False)
    model = values(set_up(fabric, module))
    new = [name for name in own if name.startswith(("classifier", "bert.pooler"))]
    problems += unlike({name: own[name] for name in new}, {name: model[name] for name in new}, "load_raw")
    problems += [] if set(report.initialized) == set(new) else [str(report)]
    return problems


def exports(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Whole, once each, for transformers to open; and back into any strategy."""
    problems = []
    for name in names_for(strategy):
        module = prepared(recorded(fabric, ZOO[name]), strategy)
        fabric.load_raw(folder / name, module)
        model = set_up(fabric, module)
        for form in ("safetensors", Safetensors(max_file_bytes=3000)):
            out = fabric.broadcast(folder / f"{strategy}-{name}-{os.getpid()}-{type(form).__name__}")
            fabric.save(out, {"model": model}, format=form)
            if fabric.is_global_zero:
                problems += wrong_with(out, name, folder, split=form != "safetensors")
        again = set_up(fabric, prepared(recorded(fabric, ZOO[name]), strategy))
        fabric.load_raw(out, again)
        problems += unlike(values(theirs(name, folder)), values(again), f"{name} again")
    return problems


def wrong_with(out: Path, name: str, folder: Path, split: bool, dtype: torch.dtype = torch.float32) -> list[str]:
    """What an export of a model of the zoo lacks, as rank 0 sees it."""
    reference = theirs(name, folder, dtype=dtype)
    loaded, info = type(reference).from_pretrained(out, output_loading_info=True)
    problems = unlike(values(reference), values(loaded), f"{name} exported") + untied(reference, loaded)
    problems += [f"{name}: {key} {value}" for key, value in info.items() if value]
    problems += [] if torch.equal(outputs(reference), outputs(loaded)) else [f"{name}: outputs differ"]
    reference.save_pretrained(folder / f"{out.name}-theirs", max_shard_size="1GB")
    for file in ("config.json", "generation_config.json"):
        mine, other = ((path / file) for path in (out, folder / f"{out.name}-theirs"))
        problems += [f"{name}: {file}"] if mine.exists() and mine.read_text() != other.read_text() else []
    stored = {file.name: load_file(file) for file in sorted(out.glob("*.safetensors"))}
    keys = [key for tensors in stored.values() for key in tensors]
    usual = load_file(folder / f"{out.name}-theirs" / "model.safetensors")
    if sorted(keys) != sorted(usual) or any(t.dtype != usual[k].dtype for s in stored.values() for k, t in s.items()):
        problems.append(f"{name}: {keys}")  # each once, as transformers writes it
    if split:
        problems += wrong_with_index(out, stored)
    elif [*stored] != ["model.safetensors"]:
        problems.append(f"{name}: {[*stored]}")
    sums = {name: entry["crc32"] for name, entry in json.loads((out / "checksums.json").read_text())["files"].items()}
    if sums != {f.name: [zlib.crc32(f.read_bytes())] for f in out.iterdir() if f.name != "checksums.json"}:
        problems.append(f"{name}: {sums}")
    return problems


def wrong_with_index(out: Path, stored: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {file: sum(value.nbytes for value in tensors.values()) for file, tensors in stored.items()}
    problems = [f"{file} holds {size} bytes" for file, size in sizes.items() if size > 3000 and len(stored[file]) > 1]
    if len(stored) < 2 or index["weight_map"] != {key: file for file, tensors in stored.items() for key in tensors}:
        problems.append(f"weight_map: {index}")
    if index["metadata"]["total_size"] != sum(sizes.values()):
        problems.append(f"total_size: {index['metadata']}")
    return problems


def outputs(model: Any) -> Tensor:
    model = model.eval()
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(TOKENS, **more).logits  # type: ignore[no-any-return]


def exports_half(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """From the config of a float32 model, in 16 bits: the export says that it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    half = beside(fabric, precision="bf16-true")
    config = AutoConfig.from_pretrained(folder / "llama")
    make = lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # noqa: E731
    module = recorded(half, make)
    half.load_raw(folder / "llama", module)
    model = set_up(half, module)
    expected = values(theirs("llama", folder, dtype=torch.bfloat16))
    problems = unlike(expected, values(model))
    out = half.broadcast(folder / f"{strategy}-half-{os.getpid()}")
    half.save(out, {"model": model}, format="safetensors")
    return problems + (wrong_with(out, "llama", folder, False, torch.bfloat16) if half.is_global_zero else [])


def read_by_calls() -> int:
    """Bytes that this process got from read calls so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def parts_of(model: Any) -> list[Tensor]:
    """What this rank keeps of the parameters."""
    return [getattr(p, "ds_tensor", p.to_local() if isinstance(p, DTensor) else p) for p in model.parameters()]


def reads_its_part(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """Not more than this rank keeps, before setup and after; what is converted no more either."""
    problems = []
    fabric.load_raw(folder / "whole", set_up(fabric, recorded(fabric)))  # imports what it needs
    for precision in ("32-true", "bf16-true") if strategy == "fsdp" else ("32-true",):
        here = beside(fabric, precision=precision)
        for late in (True, False):
            module = recorded(here, Tall)
            model = set_up(here, module) if late else module
            before = read_by_calls()
            here.load_raw(folder / "tall.safetensors", model)
            model = model if late else set_up(here, model)
            count = read_by_calls() - before
            most = 1.05 * sum(part.numel() for part in parts_of(model)) * 4 + (64 << 10)
            if count > most:
                problems.append(f"{precision}, late {late}: {count} bytes were read of {most:.0f}")
    return problems


def anonymous() -> int:
    """Memory of this process that is no file's, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(most: list[int]) -> Iterator[None]:
    """Appends how much more memory than before was used at once."""
    base, peak, done = anonymous(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        most.append(max(peak, anonymous()) - base)


def holds_its_part(fabric: Fabric, strategy: str, folder: Path) -> list[str]:
    """At no time more than this rank keeps and one tensor."""
    most: list[int] = []
    set_up(fabric, recorded(fabric))  # imports what it needs
    with watched(most):
        module = recorded(fabric, Large)
        fabric.load_raw(folder / "large.safetensors", module)
        model = set_up(fabric, module)
    kept = sum(part.nbytes for part in parts_of(model))
    largest = max(p.numel() * p.element_size() for p in module.parameters())
    return (
        [] if most[0] <= kept + largest + (64 << 20) else [f"{most[0] >> 20} MB beside {kept >> 20} MB that are kept"]
    )


Check = Callable[[Fabric, str, Path], list[str]]
EVERY: Final = ("single_device", "ddp", "fsdp", "tp", "zero1", "zero3")
CHECKS: Final[list[tuple[Check, tuple[str, ...]]]] = [
    (every_form, (*EVERY, "fsdp3", "hsdp")),
    (after_setup, (*EVERY, "fsdp3", "hsdp")),
    (built_for_real, (*EVERY, "fsdp3", "hsdp")),
    (like_transformers, EVERY),
    (in_bfloat16, ("single_device", "ddp", "fsdp", "tp", "zero3")),
    (steps_from_there, EVERY),
    (changed_before_setup, ("single_device", "fsdp", "tp", "zero3")),
    (apart, ("ddp", "fsdp", "tp", "zero1", "zero3", "hsdp")),
    (gone_by_then, ("single_device", "fsdp")),
    (some_missing, (*EVERY, "fsdp3", "hsdp")),
    (nothing_changes, EVERY),
    (other_names, ("single_device", "fsdp", "tp")),
    (from_pretrained, ("single_device", "ddp", "fsdp", "zero3")),
    (from_pretrained_half, ("single_device", "fsdp")),
    (with_a_new_head, ("single_device", "ddp", "fsdp", "zero3")),
    (exports, EVERY),
    (holds_its_part, ("fsdp", "tp")),
    (reads_its_part, ("fsdp", "tp", "zero3", "fsdp3")),
    (exports_half, ("single_device", "fsdp", "zero3")),
]


# A world of each size does the checks of several strategies.
WORLDS: Final[dict[str, tuple[int, dict[str, str]]]] = {
    "one": (1, {"single_device": "single_device"}),
    "two": (2, {name: name for name in ("ddp", "fsdp", "tp", "zero1", "zero3")}),
    "three": (3, {"fsdp3": "fsdp"}),
    "four": (4, {"hsdp": "hsdp"}),
}


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_checks(fabric: Fabric, world: str, folder: Path) -> dict[tuple[str, str], str | None]:
    """Problems of all ranks, by strategy and check."""
    quiet()
    found = {}
    for strategy, config in WORLDS[world][1].items():
        here = beside(fabric, strategy=config_of(config))
        for check, strategies in CHECKS:
            if strategy in strategies:
                work = lambda check=check, here=here, strategy=strategy: check(here, strategy, folder)  # noqa: E731
                found[strategy, check.__name__] = agreed(problem_of(work))
    return found


def config_of(name: str) -> Any:
    config = STRATEGIES[name]
    return replace(config, timeout=PATIENCE) if config.distributed else config


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    write_all(folder)
    return folder


@cache
def found_in(world: str, folder: Path) -> dict[tuple[str, str], str | None]:
    size, strategies = WORLDS[world]
    fabric = Fabric(accelerator="cpu", strategy=config_of(next(iter(strategies.values()))), devices=size)
    try:
        return fabric.launch(run_checks, world, folder)  # type: ignore[no-any-return]
    except LaunchError as error:  # kept as well: the other checks of this world need not wait for the same end
        return dict.fromkeys(((s, check.__name__) for check, _ in CHECKS for s in strategies), str(error))


@pytest.mark.timeout(400)  # the first of a world waits for all of its checks
@pytest.mark.parametrize(
    ("world", "strategy", "check"),
    [
        pytest.param(world, strategy, check.__name__, id=f"{strategy}-{check.__name__}")
        for world, (_, strategies) in WORLDS.items()
        for strategy in strategies
        for check, where in CHECKS
        if strategy in where
    ],
)
def test_in_a_world(world: str, strategy: str, check: str, files: Path) -> None:
    problem = found_in(world, files)[strategy, check]
    assert problem is None, problem


# -- mapped ------------------------------------------------------------------------------------------------------------


def mapped_files(tensor: Tensor) -> str:
    """The file whose memory holds the tensor's first value, as Linux says."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        first, _, last = place.partition("-")
        if int(first, 16) <= address < int(last, 16):
            return name
    return ""


def mapped(path: Path, strategy: str = "single_device") -> tuple[Fabric, Any]:
    """A model over the file itself, set up."""
    fabric = one(strategy)
    module = recorded(fabric, Tall)
    fabric.load_raw(path, module)
    return fabric, fabric.setup(module)


def test_whole_tensors_use_the_memory_of_their_file(files: Path) -> None:
    _, model = mapped(files / "tall.safetensors")
    assert {mapped_files(p) for p in model.parameters()} == {str(files / "tall.safetensors")}


def test_training_never_changes_the_file(files: Path, tmp_path: Path) -> None:
    path = shutil.copy(files / "tall.safetensors", tmp_path)
    before = hashlib.sha256(Path(path).read_bytes()).digest()
    fabric = one()
    models = []
    for _ in range(2):  # each has its own copy
        module = recorded(fabric, Tall)
        fabric.load_raw(path, module)
        models.append(fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.1)))
    expected = built(Tall, THEIRS).state_dict()
    for model, optimizer in models:
        assert unlike(expected, model.state_dict()) == []
        for _ in range(2):
            optimizer.zero_grad()
            fabric.backward(sum(p.square().sum() for p in model.parameters()))
            optimizer.step()
        assert all(not torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert hashlib.sha256(Path(path).read_bytes()).digest() == before
    fresh = load_file(path)
    assert unlike(expected, fresh) == []


def test_what_is_mapped_is_copied_and_saved_as_any_other(files: Path, tmp_path: Path) -> None:
    fabric, model = mapped(files / "tall.safetensors")
    expected = built(Tall, THEIRS).state_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.up.bias.add_(1)
    again = pickle.loads(pickle.dumps(model))
    assert unlike(expected, again.state_dict()) == []
    assert unlike(expected, model.state_dict()) == []
    for name, param in model.named_parameters():
        out = io.BytesIO()
        torch.save(param, out)
        assert len(out.getvalue()) < param.nbytes + 4096, name
        assert param.untyped_storage().nbytes() == param.nbytes, name
        assert len(pickle.dumps(param)) < param.nbytes + 4096, name
    total = sum(value.nbytes for value in expected.values())
    for form in ("file", "folder", "safetensors"):
        fabric.save(tmp_path / form, {"model": model}, format=form)
        written = [tmp_path / form] if form == "file" else [*(tmp_path / form).iterdir()]
        assert total <= sum(file.stat().st_size for file in written) < total + (64 << 10), form
        other = fabric.setup(recorded(fabric, Tall))
        fabric.load_raw(tmp_path / form, other)
        assert unlike(expected, other.state_dict()) == []


def test_a_file_that_is_replaced_stays_with_the_model(files: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(files / "tall.safetensors", tmp_path))
    _, model = mapped(path)
    other = tmp_path / "other"
    save_file({name: torch.zeros_like(value) for name, value in built(Tall).state_dict().items()}, other)
    other.replace(path)
    assert unlike(built(Tall, THEIRS).state_dict(), model.state_dict()) == []
    path.unlink()
    assert unlike(built(Tall, THEIRS).state_dict(), model.state_dict()) == []


def test_a_file_that_is_replaced_before_setup(files: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(files / "tall.safetensors", tmp_path))
    fabric = one()
    module = recorded(fabric, Tall)
    fabric.load_raw(path, module)
    other = tmp_path / "other"
    save_file({name: torch.zeros_like(value) for name, value in built(Tall).state_dict().items()}, other)
    other.replace(path)
    assert unlike(built(Tall, THEIRS).state_dict(), fabric.setup(module).state_dict()) == []


def test_saving_over_the_file_that_is_mapped(files: Path, tmp_path: Path) -> None:
    """A checkpoint in the place of the one that the model still uses."""
    fabric = one()
    fabric.save(tmp_path / "run", {"model": fabric.setup(built(Tall, THEIRS))}, format="safetensors")
    _, model = mapped(tmp_path / "run")
    with torch.no_grad():
        model.up.bias.zero_()
    fabric.save(tmp_path / "run", {"model": model}, format="safetensors")
    expected = {**built(Tall, THEIRS).state_dict(), "up.bias": torch.zeros(512)}
    assert unlike(expected, model.state_dict()) == []
    _, again = mapped(tmp_path / "run")
    assert unlike(expected, again.state_dict()) == []
