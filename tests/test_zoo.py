"""A sample of the zoo: recorded and materialised, each model is the one that plain construction gives, bit for bit.

The whole zoo takes minutes: `make zoo`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zoo import trial
from zoo.compare import differences
from zoo.entry import Entry
from zoo.transformers_types import entries
from zoo.trial import Verdict

# Each is here for something that its constructor does and others do not.
SAMPLE = [
    "BarkModel",  # weight norm through hooks
    "Blip2ForConditionalGeneration",
    "Blip2Model",
    "DiffLlamaModel",  # torch.normal
    "Dinov2Model",
    "FunnelModel",
    "Gemma3Model",
    "GPT2LMHeadModel",
    "HubertModel",  # weight norm through parametrizations
    "LlamaForCausalLM",
    "M2M100Model",  # a table of sines with a row set to zero
    "Mamba2Model",
    "MambaForCausalLM",
    "MiniMaxModel",
    "MixtralForCausalLM",
    "ModernBertForMaskedLM",
    "SiglipModel",
    "SwinModel",  # a schedule of drop paths, and index buffers
    "T5ForConditionalGeneration",  # tied embeddings
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
    "ViTModel",
    "Wav2Vec2Model",
    "WhisperForConditionalGeneration",
]
ENTRIES = {entry.class_name: entry for entry in entries(all_classes=True) if entry.class_name in SAMPLE}


@pytest.mark.parametrize("name", SAMPLE)
def test_recorded_and_materialised_is_plainly_built(name: str) -> None:
    outcome = trial.run(ENTRIES[name])
    assert outcome.verdict is Verdict.EXACT, outcome.reasons


class Small(nn.Module):
    """Holds one of each kind of thing that is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.arange(6.0).view(2, 3), persistent=False)
        self.scale = 0.5
        self.steps = [torch.ones(2), torch.zeros(2)]


def _small() -> Small:
    torch.manual_seed(0)
    return Small()


def _bits(model: Small) -> None:
    model.one.bias.data[0] = torch.nextafter(model.one.bias.data[0], torch.tensor(9.0))


def _tie(model: Small) -> None:
    model.two.weight = nn.Parameter(model.one.weight.detach().clone())


def _strides(model: Small) -> None:
    model.table = model.table.t().contiguous().t()


def _dtype(model: Small) -> None:
    model.table = model.table.double()


def _frozen(model: Small) -> None:
    model.one.bias.requires_grad_(False)


def _number(model: Small) -> None:
    model.scale = 0.25


def _listed(model: Small) -> None:
    model.steps[1] = torch.full((2,), -0.0)


def _order(model: Small) -> None:
    model.one.weight, model.one.bias = (model.one._parameters.pop(name) for name in ("weight", "bias"))
    model.one._parameters = dict(reversed(model.one._parameters.items()))


def _persistence(model: Small) -> None:
    model._non_persistent_buffers_set.clear()


@pytest.mark.parametrize("change", [_bits, _tie, _strides, _dtype, _frozen, _number, _listed, _order, _persistence])
def test_the_comparison_sees(change: Callable[[Small], None]) -> None:
    changed = _small()
    change(changed)
    assert differences(_small(), changed)


def test_the_comparison_finds_nothing_between_equals() -> None:
    assert differences(_small(), _small()) == []


class Forgets(nn.Module):
    """Leaves half of a parameter as ``torch.empty`` found it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.weight.data[:2].zero_()
        self.bias = nn.Parameter(torch.zeros(4))


def test_what_is_never_written_is_named() -> None:
    entry = Entry("none", "none", "Forgets", Forgets)
    assert trial.uninitialised(entry, Forgets()) == ("weight",)


def test_an_error_that_names_what_is_never_written_is_right() -> None:
    outcome = trial.run(Entry("none", "none", "Forgets", Forgets))
    assert outcome.verdict is Verdict.REFUSED, outcome.reasons
