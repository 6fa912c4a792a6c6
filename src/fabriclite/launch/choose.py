"""Which way the processes of a run come to be. Pure."""

from dataclasses import dataclass
from typing import Literal

from fabriclite.errors import ConfigError, WorldError
from fabriclite.strategy import StartMethod

Way = Literal["nothing", "rerun", "spawn", "fork", "forkserver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a launch has to go by.

    Attributes:
        launched: an external launcher, or an earlier launch, has described this process already.
        processes: how many processes this machine shall run.
        nodes: how many machines.
        script: whether this process runs a script file that can be run again.
        function: whether the user gave a function to run.
    """

    launched: bool
    processes: int
    nodes: int
    script: bool
    function: bool


def choose(situation: Situation, start_method: StartMethod) -> Way:
    """How to start the missing processes.

    ``"auto"`` runs the script again for the other ranks; without a script (a notebook, ``python -c``, a test) it forks
    for the function.

    Raises:
        ConfigError: there is neither a script to run again nor a function to run.
        WorldError: several machines, but no launcher.
    """
    if situation.launched or situation.processes * situation.nodes == 1:
        return "nothing"
    if situation.nodes > 1:
        raise WorldError(
            f"`num_nodes` must be 1 without a launcher, but is {situation.nodes}. Start the script on every machine"
            f" with torchrun --nnodes {situation.nodes} --nproc-per-node {situation.processes} ..."
        )
    if start_method == "popen" or (start_method == "auto" and situation.script):
        if not situation.script:
            raise ConfigError(
                "`start_method` must not be 'popen' outside of a script, but there is no file to run again."
                " Use 'fork', or 'spawn' with a function that can be pickled."
            )
        return "rerun"
    if not situation.function:
        raise ConfigError(
            f"`launch` must get a function with start_method {start_method!r} here, but got none."
            " Put the training in a function: fabric.launch(train)."
        )
    return "fork" if start_method == "auto" else start_method
