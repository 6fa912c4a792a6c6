"""Asking SLURM to start this job again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fabriclite.errors import WorldError

_LIMIT_S: Final = 60.0
"""How long ``scontrol`` may take: its own answer when the controller is away comes sooner."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """What asks for it.

    Attributes:
        command: the program and its arguments.
    """

    command: tuple[str, ...]

    def run(self) -> None:
        """Ask. A refusal is told, and no error: what there was to save is saved."""
        try:
            done = subprocess.run(self.command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
            failure = f"ended with status {done.returncode}: {done.stderr.strip()}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = f"did not run: {error}"
        if failure is not None:
            print(f"fabriclite: {' '.join(self.command)} {failure}. Submit the job again.", file=sys.stderr, flush=True)


def requeue() -> Requeue:
    """How to have the job of this process started again.

    Raises:
        WorldError: this is no job of SLURM's, or its ``scontrol`` is not here.
    """
    job = job_of(os.environ)
    program = shutil.which("scontrol")
    if program is None:
        raise WorldError(
            "`requeue` must find scontrol on PATH to start a job again, but there is none. Leave `requeue` out, and"
            " submit the job again yourself when it ends with status 75."
        )
    return Requeue((program, "requeue", job))


def job_of(env: Mapping[str, str]) -> str:
    """The name by which SLURM knows this job; of an array, this task of it alone.

    Raises:
        WorldError: there is none.
    """
    array, task, job = (env.get(f"SLURM_{name}") for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID"))
    if array and task:
        return f"{array}_{task}"
    if not job:
        raise WorldError(
            "`requeue` must be asked for within a job of SLURM's, but SLURM_JOB_ID is not set. Leave `requeue` out, or"
            " submit the script with sbatch."
        )
    return job
