"""The example trains, saves, resumes and generates under every strategy, by the commands its docstring gives."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A warm-up longer than the run: its rates do not depend on the number of steps.
SMALL = ["--steps", "4", "--dim", "64", "--layers", "2", "--heads", "4", "--context", "32", "--warmup", "100"]
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="seconds each; asked for by FULL=1")
RUNS = [("single_device", 1), ("ddp", 2), ("fsdp", 2), ("tensor_parallel", 2), ("deepspeed", 2)]


def script(name: str, *args: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(ROOT / "examples" / name), *args]
    done = subprocess.run(
        command, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("strategy", "devices"), RUNS)
def test_train_then_generate(strategy: str, devices: int, tmp_path: Path) -> None:
    where = ["--accelerator", "cpu", "--strategy", strategy, "--devices", str(devices), "--precision", "32-true"]
    output = script("train_gpt.py", *where, *SMALL, "--out", str(tmp_path))
    assert "loss" in output
    text = script("generate.py", "--checkpoint", str(tmp_path / "checkpoint"))
    assert len(text) > 20


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=FULL)])
def test_resuming_gives_the_run_that_never_stopped(strategy: str, tmp_path: Path) -> None:
    """From what was saved on the way, under the same strategy and another."""
    where = ["--accelerator", "cpu", "--devices", "2"]
    whole = script("train_gpt.py", *where, *SMALL, "--strategy", "fsdp", "--save-every", "2", "--out", str(tmp_path))
    assert (tmp_path / "latest").resolve() == tmp_path / "step-4"
    saved = ["--resume", str(tmp_path / "step-2"), "--out", str(tmp_path / "rest")]
    rest = script("train_gpt.py", *where, *SMALL, "--strategy", strategy, *saved)
    assert re.findall(r"loss (\d+\.\d+)", whole)[-1] == re.findall(r"loss (\d+\.\d+)", rest)[-1]


def test_it_stops_when_asked_and_goes_on(tmp_path: Path) -> None:
    """On SIGTERM to one process; then by the same command on one rank, until no steps are left."""
    where = ["--accelerator", "cpu", "--strategy", "ddp", "--out", str(tmp_path), "--log-every", "1"]
    size = [*SMALL, "--batch-size", "2", "--steps", "60", "--resume", "auto"]
    command = [sys.executable, "-u", str(ROOT / "examples" / "train_gpt.py"), *where, *size, "--devices", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step    3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.communicate(timeout=100)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75
    last = int(re.findall(r"step +(\d+)/60", line + rest)[-1])
    assert 4 <= last < 60
    assert (tmp_path / "latest").resolve().name == f"step-{last}"
    for first in (f"step {last + 1:4d}/60", None):
        output = script("train_gpt.py", *where, *size, "--devices", "1")
        assert next(iter(re.findall(r"step +\d+/60", output)), None) == first
        assert "validation loss" in output
        if first is not None:
            (tmp_path / "latest").unlink()
            (tmp_path / "latest").symlink_to("checkpoint")
