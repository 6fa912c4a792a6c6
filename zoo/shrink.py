"""Makes any transformers config tiny without knowing its model.

Two ways, because no single one fits all. `Fixed` gives every width the same small value, which suits transformers of
text and images alike. `Scaled` divides every width by one power of two, which keeps each ratio between them;
convolutional models, and models that name the widths of another config's stages, need that.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Protocol

from transformers import PreTrainedConfig

VOCAB = 128

_LAYERS = re.compile(
    r"((^|_)(num_|n_)?(hidden_|decoder_|encoder_|attention_|hash_)?layers?(_per_stack)?|(^|_)depth|num_blocks"
    r"|resampler_depth|num_dense_layers|num_hidden_layers)$|^layers$|_layers$"
)
_NOT_LAYERS = re.compile(r"mamba_|exclude|insert|target|residual_layers|adapter_layers|iou_head|feature_layer|skip")
_VOCAB = re.compile(
    r"(^|_)(vocab|vocabulary)(_size)?(_per_layer_input)?$|^num_embeddings$|codebook_size$|hash_byte_group_vocab"
)
_TYPE_VOCAB = re.compile(r"(type|task|char|phoneme|sentiment)_?vocab")
_TOKEN = re.compile(r"(token_id|token_index|_idx|_index|_id|token_ids)$")
_NOT_TOKEN = re.compile(r"ignore_index|active|head_in_index|fine_matching|eval_idx")
_EXPERTS = re.compile(
    r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts|num_experts_per_layer)$"
)
_TOP = re.compile(
    r"^(num_experts_per_tok|moe_k|moe_topk|moe_top_k|top_k_experts|num_experts_per_token|topk_group|n_group)$"
)
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_sequence_length"
    r"|max_seq_len|max_length|original_max_position_embeddings|context_length|position_embedding_size|max_ep_len)$"
)
_WIDTH = re.compile(
    r"hidden|dim($|s$|_)|_dim|width|embd|inner|rank|units|filters|d_model|d_ff|^d_|_size$|channels?($|_)|dff|features"
    r"|inplanes|planes|mid_channels|embedding_size|feat_size|_sizes$|out_channels|embed_dims"
)
_NOT_WIDTH = re.compile(
    r"kernel|patch|image|img|vocab|window|batch|chunk|block|stride|crop|(?<!up)(?<!down)sample|num_channels|codebook_size|layers|rate"
    r"|merge|pool|num_hidden|grid|tile|queue|context|fpn_.*levels|levels|head_count|tubelet|video|audio_channels|mel"
    r"|mask_feature|position|max_|spec_size|group|cycles|per_layer_input$|bins|num_|resolution|view|embeds_scale"
    r"|roi_size|shape|partition|downsampl.*_channels_|_ratio|expan|state_size|act_dim|state_dim|size_divis|horizon|hidden_act"
)
_STAGES = re.compile(r"^(hidden_sizes|depths)$|_per_stage$")  # often filled in late, yet with constants
_HEADS = re.compile(r"heads?$|num_kv_heads|num_key_value_heads|n_head$|^num_attention_heads")
_NOT_HEADS = re.compile(r"out_heads|num_head_|mamba|linear_num|num_fov")


class Scheme(Protocol):
    """How widths and heads become small."""

    def width(self, name: str, value: int) -> int: ...

    def heads(self, name: str, value: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every hidden size 64, every feed-forward 128, four heads of 16."""

    def width(self, name: str, value: int) -> int:
        if value <= 16:
            return value
        if "head_dim" in name or name in ("d_kv", "d_head"):
            return 8 if "rope" in name else 16
        if "rank" in name:
            return min(value, 16)
        wide = re.search(r"intermediate|ffn|mlp|d_ff|dff|feedforward|inner|linear_units", name)
        return min(value, 128 if wide else 64)

    def heads(self, name: str, value: int) -> int:
        if "kv" in name or "key_value" in name:
            return 2 if value > 1 else 1
        return min(value, 4) if value != 3 else 2


@dataclass(frozen=True, slots=True)
class Scaled:
    """Every width divided by the same power of two; heads as they are."""

    by: int

    def width(self, name: str, value: int) -> int:
        return value if value <= 16 else max(value // self.by, 4)

    def heads(self, name: str, value: int) -> int:
        return value


SCHEMES: tuple[Scheme, ...] = (Fixed(), Scaled(16), Scaled(8), Scaled(4), Scaled(2), Scaled(1))


def shrink(config: PreTrainedConfig, scheme: Scheme, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A fresh config of the same class, small. ``overrides`` maps ``field`` or ``sub_config.field`` to its value."""
    layers = _layers_needed(config)
    kwargs: dict[str, Any] = {}
    fresh = _fresh(type(config))
    for f in fields(type(config)):
        value = _stored(config, f.name)
        inner = _below(overrides, f.name)
        if isinstance(value, PreTrainedConfig):
            kwargs[f.name] = shrink(value, scheme, inner)
        elif _is_own(f, value, fresh):
            value = value[:layers] if _is_per_layer(config, value) else value
            kwargs[f.name] = _value(f.name, value, scheme, layers)
        elif f.name == "vocab_size":
            kwargs[f.name] = VOCAB
    if "_out_indices" in config.__dict__:
        kwargs |= {"out_features": None, "out_indices": _out_indices(config, layers)}
    for name, value in _extra(config, fresh).items():
        kwargs[name] = _value(name, value, scheme, layers)
    kwargs.update({name: value for name, value in (overrides or {}).items() if "." not in name})
    return type(config)(**{name: value for name, value in kwargs.items() if value is not MISSING})


def _stored(config: PreTrainedConfig, name: str) -> Any:
    """What a field holds, read past properties that compute and past names that stand for others."""
    return config.__dict__.get(config.attribute_map.get(name, name))


def _below(overrides: dict[str, Any] | None, name: str) -> dict[str, Any]:
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in (overrides or {}).items() if key.startswith(start)}


def _fresh(cls: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return cls()
    except Exception:  # its own defaults contradict each other: nothing to compare with
        return None


def _is_own(f: "Field[Any]", value: Any, fresh: PreTrainedConfig | None) -> bool:
    """Whether ``value`` was given, not derived: a derived one must be derived again from the small values."""
    if value is None or f.name.startswith("_"):
        return False
    if f.default is None and not _STAGES.search(f.name):
        return fresh is None or repr(_stored(fresh, f.name)) != repr(value)
    return True


def _out_indices(config: PreTrainedConfig, layers: int) -> list[int]:
    """The stages that a backbone hands out: the same where stages stay, the last ones where each layer is a stage."""
    indices = list(config.__dict__["_out_indices"])
    if "num_hidden_layers" not in config.__dict__ or len(config.stage_names) != config.num_hidden_layers + 1:
        return indices
    return list(range(layers - len(indices) + 1, layers + 1))


def _extra(config: PreTrainedConfig, fresh: PreTrainedConfig | None) -> dict[str, Any]:
    """What the config was given beyond its fields. What a fresh one has as well is derived."""
    known = {f.name for f in fields(type(config))} | set({} if fresh is None else fresh.__dict__)
    return {name: value for name, value in config.__dict__.items() if name not in known and not name.startswith("_")}


def _layers_needed(config: PreTrainedConfig) -> int:
    """Two, or so many that each kind of layer occurs and each layer that is named exists."""
    need = 2
    for name, value in config.__dict__.items():
        if not isinstance(value, list | tuple) or not value:
            continue
        if name.endswith(("layer_types", "layers_block_type")) and all(isinstance(v, str) for v in value):
            need = max(need, 1 + max(value.index(kind) for kind in set(value)))
        elif _names_layers(name, value) or name == "_out_indices":
            need = max(need, len(value))
    return min(need, 8)


def _names_layers(name: str, value: Any) -> bool:
    return bool(re.search(r"ind(ex|ic)|_idxs|_layers$|_layer$|hook_ids", name)) and all(type(v) is int for v in value)


def _is_per_layer(config: PreTrainedConfig, value: Any) -> bool:
    count = _stored(config, "num_hidden_layers")
    return isinstance(value, list | tuple) and isinstance(count, int) and len(value) == count > 4


def _value(name: str, value: Any, scheme: Scheme, layers: int) -> Any:
    if isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return _number(name, value, scheme, layers)
    if isinstance(value, list | tuple) and value:
        return _sequence(name, value, scheme, layers)
    if isinstance(value, dict):
        return _mapping(name, value, scheme, layers)
    return value


def _number(name: str, value: int, scheme: Scheme, layers: int) -> int:
    rules: list[tuple[bool, Callable[[], int]]] = [
        (value <= 0, lambda: value),
        (bool(_TYPE_VOCAB.search(name)), lambda: value),
        (bool(_LAYERS.search(name)) and not _NOT_LAYERS.search(name), lambda: min(value, layers)),
        (bool(_VOCAB.search(name)), lambda: min(value, VOCAB)),
        (bool(_TOKEN.search(name)) and not _NOT_TOKEN.search(name), lambda: value % VOCAB if value >= VOCAB else value),
        (bool(_EXPERTS.search(name)), lambda: min(value, 4)),
        (bool(_TOP.search(name)), lambda: min(value, 2)),
        (bool(_POSITIONS.search(name)), lambda: min(value, 512)),
        (bool(_HEADS.search(name)) and not _NOT_HEADS.search(name), lambda: scheme.heads(name, value)),
        (bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name), lambda: scheme.width(name, value)),
    ]
    return next((rule() for holds, rule in rules if holds), value)


def _sequence(name: str, value: Any, scheme: Scheme, layers: int) -> Any:
    kind = type(value)
    if name.endswith(("layer_types", "layers_block_type", "_per_layer")):
        return kind(value[:layers])
    if not all(type(v) is int for v in value):
        return value
    if name in ("depths", "depth", "num_block_repeats", "stage_num_blocks", "n_attn_blocks"):
        return kind(min(v, 2) for v in value)
    if _names_layers(name, value) and min(value) >= 0:
        return kind(v if v < layers else min(i, layers - 1) for i, v in enumerate(value))
    if _TOKEN.search(name):
        return kind(v % VOCAB for v in value)
    if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and not isinstance(scheme, Fixed):
        return kind(scheme.width(name, v) for v in value)
    return value


def _mapping(name: str, value: dict[Any, Any], scheme: Scheme, layers: int) -> dict[Any, Any]:
    if name in ("id2label", "label2id"):
        return value
    return {key: _value(key, inner, scheme, layers) if isinstance(key, str) else inner for key, inner in value.items()}


def _sections(sections: list[int], scheme: Scheme) -> list[int]:
    """Rotary sections that still add up to half a head."""
    total = sum(sections)
    small = [part * (scheme.width("head_dim", 2 * total) // 2) // total for part in sections]
    return [scheme.width("head_dim", 2 * total) // 2 - sum(small[1:]), *small[1:]]
