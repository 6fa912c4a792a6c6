"""The model whose weights `checkpoint.py` saves and loads: a Llama, of transformers or of torch's layers alone."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILES: Final = 4
_PATTERN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama in float32, head not tied."""

    width: int
    inner: int
    layers: int
    words: int
    heads: int

    @classmethod
    def near(cls, nbytes: float) -> "Shape":
        """One whose weights take about so many bytes."""
        base = cls(1024, 2816, 0, 32000, 16) if nbytes > 4e8 else cls(256, 704, 0, 8000, 4)
        layer = 4 * (4 * base.width**2 + 3 * base.width * base.inner)
        layers = round((nbytes - 8 * base.words * base.width) / layer)
        return cls(**{**asdict(base), "layers": max(1, layers)})


TINY: Final = Shape(64, 176, 2, 512, 2)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(shape.width, shape.width, bias=False))
        self.mlp = nn.Module()
        for name in ("gate_proj", "up_proj"):
            self.mlp.add_module(name, nn.Linear(shape.width, shape.inner, bias=False))
        self.mlp.add_module("down_proj", nn.Linear(shape.inner, shape.width, bias=False))
        self.input_layernorm = nn.RMSNorm(shape.width)
        self.post_attention_layernorm = nn.RMSNorm(shape.width)


class PlainLlama(nn.Module):
    """The parameters of transformers' ``LlamaForCausalLM`` under the same names. Nothing here computes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.words, shape.width)
        self.model.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.model.norm = nn.RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.words, bias=False)


def llama(shape: Shape) -> nn.Module:
    """The model, built the way its code says: of transformers where that is installed."""
    if not find_spec("transformers"):
        return PlainLlama(shape)
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config_of(shape))


def config_of(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        vocab_size=shape.words,
        num_attention_heads=shape.heads,
        tie_word_embeddings=False,
        dtype="float32",
    )


class Undrawn(TorchFunctionMode):
    """Random values are zeros: memory is there and was written, as after any initialisation, but sooner."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def with_memory(shape: Shape, device: str) -> nn.Module:
    """The model with memory that was written."""
    with Undrawn(), torch.device(device):
        return llama(shape)


def without_memory(shape: Shape) -> nn.Module:
    """The model on the meta device, but for what no file holds: that is there."""
    with torch.device("meta"):
        model = llama(shape)
    return with_own_buffers(model, shape)


def with_own_buffers(model: Any, shape: Shape) -> nn.Module:
    """Give a model that came from the meta device the values that its own code computes and no file holds."""
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(config_of(shape))
    return model


def sharded(model: Any, device: str, world: int) -> nn.Module:
    """``fully_shard`` by hand: each layer, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(value: Any) -> Tensor:
    """This rank's part."""
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def fill(model: nn.Module) -> None:
    """Give every parameter values that differ from place to place. Fast: a pattern, shifted from one to the next."""
    pattern = torch.rand(_PATTERN, generator=torch.Generator().manual_seed(0))
    for index, param in enumerate(model.parameters()):
        flat = local(param).view(-1)
        own = pattern.roll(index * 977).to(flat.device)
        for part in flat.split(_PATTERN):
            part.copy_(own[: part.numel()])


def total(tensors: Iterator[Tensor] | list[Tensor]) -> float:
    """Of all values of this rank: what it takes is to read every one."""
    return sum(local(tensor).sum().item() for tensor in tensors)


# -- the files of a Hugging Face model ---------------------------------------------------------------------------------


def write_pretrained(folder: Path, shape: Shape) -> None:
    """Four safetensors files of nearly one size, their index, and the configuration."""
    from safetensors.torch import save_file

    model = with_memory(shape, "cpu")
    fill(model)
    state = dict(model.state_dict())
    size, at, names = sum(t.nbytes for t in state.values()), 0, {}
    for name, tensor in state.items():
        names[name] = f"model-{min(FILES, 1 + at * FILES // size):05d}-of-{FILES:05d}.safetensors"
        at += tensor.nbytes
    folder.mkdir(parents=True)
    for file in sorted(set(names.values())):
        part = {name: tensor for name, tensor in state.items() if names[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with suppress(ImportError):
        config_of(shape).save_pretrained(folder)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def ranges(file: Path, rank: int, world: int) -> list[tuple[int, int]]:
    """Offset and length, in bytes, of this rank's rows of every tensor in a safetensors file, in the file's order."""
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = []
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        begin, _ = entry["data_offsets"]
        rows, *others = entry["shape"]
        step, row = -(-rows // world), 4 * prod(others)
        first, last = min(rows, rank * step), min(rows, (rank + 1) * step)
        found.append((8 + length + begin + first * row, (last - first) * row))
    return sorted(one for one in found if one[1])


def joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same with neighbours as one."""
    found: list[tuple[int, int]] = []
    for offset, length in parts:
        if found and sum(found[-1]) == offset:
            offset, length = found[-1][0], found[-1][1] + length
            found.pop()
        found.append((offset, length))
    return found


def share_of(folder: Path, rank: int, world: int) -> int:
    """Bytes of this rank's part of the weights."""
    return sum(length for file in shards_of(folder) for _, length in ranges(file, rank, world))


def largest_in(folder: Path) -> int:
    """Bytes of the largest tensor."""
    return max(length for file in shards_of(folder) for _, length in ranges(file, 0, 1))
