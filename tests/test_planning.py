"""Planning as users see it: states against published figures, traffic, search, models, the command, pictures.

What an estimate says of memory is compared with measured peaks elsewhere (tests of the estimate, and a benchmark).
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fabriclite import (
    ConfigError,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Precision,
    SingleDeviceStrategy,
)
from fabriclite.layout import Layout
from fabriclite.planning.hardware import LINKS, Hardware, parse_bandwidth, parse_bytes
from fabriclite.planning.static import MOMENTS, moments, states
from fabriclite.planning.traffic import Axis, Parcel, of_data_parallelism, timed, to_host
from fabriclite.planning.values import Traffic

GB = 10**9
LLAMA_2_7B = 6_738_415_616
LLAMA_2_70B = 68_976_648_192
GPT_3 = 175 * GB
"""Billions of Table 2.1 of Brown et al. 2020 (arXiv:2005.14165); of Llama 2 the parameters of its published shapes."""


def layout(config: Any, size: int, precision: str = "bf16-true") -> Layout:
    made: Layout = config.layout(size, Precision.parse(precision))
    return made


def zero(stage: Any, size: int, parameters: int) -> float:
    """GB of one rank under our ZeRO, in true 16 bits with Adam: what the paper counts."""
    return states(layout(DeepSpeedStrategy(stage=stage), size), parameters, optimizer="adam").device.total / GB


# -- published: states -----------------------------------------------------------------------------------------------

# Rajbhandari, Rasley, Ruwase, He: ZeRO, SC 2020 (arXiv:1910.02054), Table 1: GB of a device by the degree of data
# parallelism, for stages 1, 2, 3. The paper rounds to the digits shown, large ones down.
ZERO_TABLE_1 = {
    int(7.5 * GB): {
        1: (120, 120, 120),
        4: (52.5, 41.3, 30),
        16: (35.6, 21.6, 7.5),
        64: (31.4, 16.6, 1.88),
        256: (30.4, 15.4, 0.47),
        1024: (30.1, 15.1, 0.12),
    },
    128 * GB: {
        1: (2048, 2048, 2048),
        4: (896, 704, 512),
        16: (608, 368, 128),
        64: (536, 284, 32),
        256: (518, 263, 8),
        1024: (513, 257, 2),
    },
    1000 * GB: {
        1: (16000, 16000, 16000),
        4: (7000, 5500, 4000),
        16: (4750, 2875, 1000),
        64: (4187, 2218, 250),
        256: (4046, 2054, 62.5),
        1024: (4011, 2013, 15.6),
    },
}


@pytest.mark.parametrize("parameters", ZERO_TABLE_1)
def test_states_are_those_of_the_zero_paper_s_table(parameters: int) -> None:
    for size, row in ZERO_TABLE_1[parameters].items():
        for stage, published in zip((1, 2, 3), row, strict=True):
            ours = zero(stage, size, parameters)
            digit = 10.0 ** -len(str(published).partition(".")[2])  # one unit of the last place that is printed
            assert abs(ours - published) < digit, (size, stage, ours, published)


@given(st.integers(1, 10**12), st.sampled_from([1, 2, 8, 64, 1024, 16384]))
def test_states_follow_the_zero_paper_s_formulae(psi: int, n: int) -> None:
    """(2 + 2 + K) Psi / N in its three forms, K = 12; Section 5 of the paper."""
    formulae = {1: 4 * psi + 12 * psi / n, 2: 2 * psi + 14 * psi / n, 3: 16 * psi / n}
    for stage, expected in formulae.items():
        assert abs(zero(stage, n, psi) * GB - expected) <= 16  # bytes: parts are rounded up to whole elements


@pytest.mark.parametrize(
    ("config", "precision", "per_parameter"),
    [
        (DDPStrategy(), "bf16-true", 2 + 2 + 4),  # torch's Adam keeps its moments in the parameters' dtype
        (DDPStrategy(), "32-true", 16),
        (DDPStrategy(), "bf16-mixed", 16),  # parameters stay float32, autocast rounds
        (FSDPStrategy(), "bf16-true", 8 / 64),
        (FSDPStrategy(), "bf16-mixed", 16 / 64),
        (FSDPStrategy(device_mesh=(8, 8)), "bf16-mixed", 16 / 8),
        (DeepSpeedStrategy(stage=1), "bf16-true", 4 + 12 / 64),
        (DeepSpeedStrategy(stage=2), "bf16-true", 2 + 14 / 64),
        (DeepSpeedStrategy(stage=3), "bf16-true", 16 / 64),
        (DeepSpeedStrategy(stage=3), "bf16-mixed", 16 / 64),
        (ModelParallelStrategy(tensor_parallel_size=8), "bf16-true", 8 / 64),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str | float | int) else type(value).__name__,
)
@pytest.mark.parametrize("parameters", [LLAMA_2_7B, LLAMA_2_70B, GPT_3])
def test_states_of_published_shapes(config: Any, precision: str, per_parameter: float, parameters: int) -> None:
    ours = states(layout(config, 64, precision), parameters).device.total
    assert ours == pytest.approx(per_parameter * parameters, rel=1e-6)


def test_published_shapes_have_these_parameters() -> None:
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    large = dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    for shape, expected in ((small, LLAMA_2_7B), (large, LLAMA_2_70B)):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32000, **shape))
        assert sum(p.numel() for p in model.parameters()) == expected


def test_offloaded_states_lie_on_the_host() -> None:
    for config in (FSDPStrategy(cpu_offload=True), DeepSpeedStrategy(offload_optimizer=True, offload_parameters=True)):
        found = states(layout(config, 8), LLAMA_2_7B)
        assert found.device.total == 0
        assert set(found.host.by_kind) == {"parameters", "gradients", "optimizer"}
    plain = states(layout(SingleDeviceStrategy(), 1), 100, trainable=10)
    assert plain.device.by_kind == {"parameters": 200, "gradients": 20, "optimizer": 40}
    assert plain.host.total == 0


def test_optimizers_keep_what_the_table_says() -> None:
    """Against torch itself: the elements of state as large as the parameter after a step."""
    makers = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    assert set(makers) == set(MOMENTS)
    for name, make in makers.items():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = make([param])
        optimizer.step()
        kept = [t for t in optimizer.state[param].values() if isinstance(t, torch.Tensor) and t.shape == param.shape]
        assert len(kept) == moments(name), name


# -- traffic ---------------------------------------------------------------------------------------------------------


def parcels(dtype: torch.dtype = torch.bfloat16, wire: torch.dtype | None = None) -> list[Parcel]:
    """Two blocks, and a root a tenth as large."""
    sizes = [(1000, False), (1000, False), (100, True)]
    return [Parcel({dtype: size}, {dtype: size}, root, wire) for size, root in sizes]


def sent(traffic: list[Traffic]) -> int:
    return sum(item.bytes for item in traffic)


def test_volumes_are_those_of_the_zero_paper() -> None:
    """Section 7 of the ZeRO paper: data parallelism and stages 1 and 2 send 2 Psi elements, stage 3 sends 3 Psi."""
    psi = 2 * 10**9
    whole = [Parcel({torch.bfloat16: psi}, {torch.bfloat16: psi})]
    for config, times in (
        (DDPStrategy(), 2),
        (DeepSpeedStrategy(stage=1), 2),
        (DeepSpeedStrategy(stage=2), 2),
        (DeepSpeedStrategy(stage=3), 3),
        (FSDPStrategy(reshard_after_forward=True), 3),
        (FSDPStrategy(reshard_after_forward=False), 2),
    ):
        for size in (2, 64, 1024):
            found = sent(of_data_parallelism(whole, layout(config, size), 8))
            assert found == pytest.approx(times * psi * 2 * (size - 1) / size, rel=1e-6)


def test_the_root_of_fsdp_is_gathered_once() -> None:
    found = {t.what: t for t in of_data_parallelism(parcels(), layout(FSDPStrategy(), 4), 4)}
    assert found["all-gather of parameters in forward"].bytes == 2100 * 2 * 3 // 4
    assert found["all-gather of parameters in forward"].calls == 3
    assert found["all-gather of parameters in backward"].bytes == 2000 * 2 * 3 // 4
    assert found["all-gather of parameters in backward"].calls == 2
    assert found["reduce-scatter of gradients"].bytes == 2100 * 2 * 3 // 4


def test_mixed_precision_gathers_in_16_bits_and_reduces_in_float32() -> None:
    found = of_data_parallelism(parcels(torch.float32, torch.bfloat16), layout(FSDPStrategy(), 2, "bf16-mixed"), 2)
    by_name = {t.what: t.bytes for t in found}
    assert by_name["all-gather of parameters in forward"] == 2100 * 2 // 2
    assert by_name["reduce-scatter of gradients"] == 2100 * 4 // 2


def test_hybrid_sharding_gathers_inside_a_node_and_reduces_between_them() -> None:
    found = of_data_parallelism(parcels(), layout(FSDPStrategy(device_mesh=(4, 8)), 32), 8)
    gathers = [t for t in found if "all-gather" in t.what]
    assert {t.link for t in gathers} == {"node"}
    (between,) = [t for t in found if t.link == "network"]
    assert between.what == "all-reduce of gradients' shards"
    assert between.bytes == round(2 * (2100 * 2 / 8) * 3 / 4)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]))
def test_the_shares_of_links_are_one(size: int, stride: int, per_node: int) -> None:
    shares = Axis(size, stride).shares(per_node)
    assert sum(shares.values()) == (0 if size == 1 else pytest.approx(1))
    assert ("network" in shares) == (size > 1 and size * stride > per_node)


def test_one_rank_sends_nothing_and_frozen_parameters_no_gradient() -> None:
    for config in (SingleDeviceStrategy(), DDPStrategy(), FSDPStrategy(), DeepSpeedStrategy()):
        assert sent(of_data_parallelism(parcels(), layout(config, 1), 8)) == 0
    frozen = [Parcel({torch.bfloat16: 100}, {})]
    assert sent(of_data_parallelism(frozen, layout(DDPStrategy(), 8), 8)) == 0
    assert sent(of_data_parallelism(frozen, layout(FSDPStrategy(reshard_after_forward=False), 2), 8)) == 100


def test_offloading_goes_over_the_host_s_link() -> None:
    found = {t.what: t for t in to_host(parcels(), layout(FSDPStrategy(cpu_offload=True), 4))}
    assert {t.link for t in found.values()} == {"host"}
    assert found["offloaded parameters"].bytes == (2100 + 2000) * 2 // 4
    assert found["offloaded gradients"].bytes == 2100 * 2 // 4
    stepped = {
        t.what: t.bytes for t in to_host(parcels(), layout(DeepSpeedStrategy(stage=2, offload_optimizer=True), 4))
    }
    assert stepped == {"offloaded gradients": 1050, "stepped parameters": 1050}
    assert to_host(parcels(), layout(FSDPStrategy(), 4)) == []


def test_seconds_follow_from_bandwidths_that_are_given() -> None:
    items = [Traffic("x", "node", 450 * GB, 1), Traffic("y", "network", 5, 1)]
    first, second = timed(items, Hardware(node=parse_bandwidth("nvlink4", "node_bandwidth")))
    assert first.seconds == 1.0
    assert second.seconds is None


# -- hardware --------------------------------------------------------------------------------------------------------


def test_sizes_and_bandwidths_are_read() -> None:
    assert parse_bytes("80GB") == 80 * GB
    assert parse_bytes("80 GiB") == 80 * 2**30
    assert parse_bytes(1024) == 1024
    assert parse_bandwidth("50", "network_bandwidth") == LINKS["ib-400"] == 50e9


@pytest.mark.parametrize("text", ["80 apples", "", "-1GB", "0", "GB"])
def test_a_size_must_be_one(text: str) -> None:
    with pytest.raises(ConfigError, match="`memory` must be a size such as 80GB or 80GiB, but is"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["fast", "0", "-3"])
def test_a_bandwidth_must_be_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`node_bandwidth` must be GB/s above 0 or one of nvlink3, .*, but is"):
        parse_bandwidth(text, "node_bandwidth")


def test_an_optimizer_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"`optimizer` must be one of adam, .*, but is 'lamb'"):
        moments("lamb")
