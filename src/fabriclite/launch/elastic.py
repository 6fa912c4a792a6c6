"""What ``fabriclite run`` does: torchrun's agent, with ranks whose failures are recorded, and our page at the end.

The agent, its options and its rendezvous are torch's own. Ours are the ranks' first lines (``rank.py``), the store on
the loopback where there is one machine, one line for each new attempt, and what is printed last.
"""

import logging
import os
import signal
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, determine_local_world_size, parse_min_max_nnodes

from fabriclite.errors import ConfigError
from fabriclite.launch import stores
from fabriclite.launch.command import Program
from fabriclite.launch.environments.described import LOOPBACK
from fabriclite.launch.failures import outlet, verdict
from fabriclite.launch.failures.members import host, look, this_process
from fabriclite.launch.failures.record import PREEMPTED
from fabriclite.launch.failures.verdict import Exit, Verdict
from fabriclite.launch.local import private_folder, threads_each
from fabriclite.launch.rank import STORE, attempt_folder
from fabriclite.launch.wishes import Wishes

_SHARED_STORE: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, torch's agents do not serve their own store to the ranks: on one machine ours is there for that."""


def run(args: Namespace, wishes: Wishes) -> int:
    """Run the script that ``args`` names on this machine's ranks, and again after failures where that is allowed.

    Args:
        args: as torchrun's own parser gives them.
        wishes: what the command line says to ``Fabric``.

    Returns:
        Exit status: 0; the failed rank's (128 and the number of a signal); 75 if the ranks saved to be started again;
        128 and the number of the signal that ended this process.

    Raises:
        ConfigError: there is no such script, or the options contradict each other.
    """
    if not (args.module or args.no_python) and not Path(args.training_script).exists():
        raise ConfigError(f"The script must be a file, but {args.training_script!r} is none. With -m, name a module.")
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # the agent tells of every failure itself, in several lines
    size = _processes(args)
    if size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(size)))
    os.environ.update(wishes.variables())
    store = _meet_on_loopback(args) if _is_alone(args) else None
    # Torch 2.13's agents tell where ranks meet in their first round alone: one that joins later would wait in vain.
    os.environ.setdefault(_SHARED_STORE, "1")
    if args.master_port is None:
        args.master_port = 29500  # torchrun's
    with private_folder() as folder:
        os.environ[outlet.FOLDER] = str(folder)
        if (args.log_dir, args.redirects, args.tee) == (None, "0", "0"):
            args.log_dir = str(folder)  # torch would leave an empty folder behind
        status = _supervise(_config(args), _command(args), folder)
    del store  # until here it served the ranks
    return status


def _processes(args: Namespace) -> int:
    if args.nproc_per_node is None:
        args.nproc_per_node = os.environ.get("PET_NPROC_PER_NODE", "1")  # torchrun's own variable and default
    try:
        return int(determine_local_world_size(args.nproc_per_node))
    except ValueError as error:
        raise ConfigError(
            f"--nproc-per-node must be a number, auto, cpu or gpu, but is {args.nproc_per_node!r}: {error}"
        ) from error


def _is_alone(args: Namespace) -> bool:
    """Whether one machine is all there will be, and the user has left it to us where its ranks meet."""
    try:
        _, most = parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--nnodes must be N or MIN:MAX, but is {args.nnodes!r}.") from error
    return bool(args.standalone) or (most == 1 and not args.rdzv_endpoint and args.master_port is None)


def _meet_on_loopback(args: Namespace) -> object:
    """Serve all that is asked of a store where no other machine reaches it; torch would listen on every address."""
    store = stores.serve()
    address = f"{LOOPBACK}:{store.port}"
    args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", address, uuid.uuid4().hex
    args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, "is_host=false"]))
    args.local_addr = args.local_addr or LOOPBACK
    os.environ[STORE] = address
    return store


def _config(args: Namespace) -> LaunchConfig:
    try:
        return config_from_args(args)[0]
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"The options must fit each other, but do not: {error}") from error


def _command(args: Namespace) -> list[str]:
    if args.no_python:
        return [args.training_script, *args.training_script_args]
    program = Program(
        options=["-u"], module=args.module, name=args.training_script, arguments=args.training_script_args
    )
    return program.as_rank(os.environ.get("PYTHON_EXEC", sys.executable), bool(sys.flags.safe_path))


def _supervise(config: LaunchConfig, command: Sequence[str], folder: Path) -> int:
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    agent = _Agent(config, _spec(config, parameters, command), folder)
    try:
        result = agent.run()
    except SignalException as error:
        if agent.preempted:
            return PREEMPTED
        print(f"\nfabriclite: ended by {error.sigval.name}; so are all ranks of this machine.", file=sys.stderr)
        return 128 + int(error.sigval)
    finally:
        agent.close()
    found = agent.verdict(result)
    if found is not None:
        print(f"\nfabriclite: {found.text}", file=sys.stderr)
        return found.status
    return PREEMPTED if agent.preempted else 0


def _spec(config: LaunchConfig, parameters: RendezvousParameters, command: Sequence[str]) -> WorkerSpec:
    address, _, port = config.rdzv_endpoint.rpartition(":") if config.rdzv_backend == "static" else ("", "", "")
    known = {field.name for field in fields(WorkerSpec)}
    # Of newer versions of torch: options that its parser knows are passed on as they are.
    newer = {name: getattr(config, name) for name in _NEWER if name in known and hasattr(config, name)}
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=address or None,
        master_port=int(port) if port else None,
        local_addr=config.local_addr,
        **newer,
    )


_NEWER: Final = (
    "event_log_handler",
    "numa_options",
    "duplicate_stdout_filters",
    "duplicate_stderr_filters",
    "virtual_local_rank",
)


class _Agent(LocalElasticAgent):
    """Torch's agent, which tells of a failure what it knows, once.

    ``_monitor_workers`` is what torch's documentation names for extending an agent.
    """

    def __init__(self, config: LaunchConfig, spec: WorkerSpec, folder: Path) -> None:
        assert config.logs_specs is not None  # LaunchConfig sees to it
        shutdown: dict[str, Any] = {}
        if getattr(config, "shutdown_timeout", None) is not None:
            shutdown["shutdown_timeout"] = config.shutdown_timeout
        super().__init__(
            spec,
            config.logs_specs,
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
            **shutdown,
        )
        self._spec_of_run = spec
        self._failed_attempts = 0
        self._folder = folder

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        _end_stopped([worker.id for worker in worker_group.workers])
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self._failed_attempts += 1
            most = self._spec_of_run.max_restarts
            if self._failed_attempts <= most:
                found = self.verdict(result, self._failed_attempts - 1)
                why = "" if found is None else f": {_why(found)}"
                again = f"starting all ranks again, attempt {self._failed_attempts} of {most}"
                print(f"fabriclite: {again}{why}", file=sys.stderr, flush=True)
        return result

    @property
    def preempted(self) -> bool:
        """Whether the last ranks want to be started again. Those before them were: for a machine that joined, say."""
        return outlet.any_preempted(self._folder, [worker.id for worker in self._worker_group.workers])

    def verdict(self, result: RunResult, attempt: int | None = None) -> Verdict | None:
        """What is to be said of a failed attempt, the last one by default; ``None`` if it has not failed."""
        if not result.is_failed():
            return None
        number = self._failed_attempts - 1 if attempt is None else attempt
        now = time.time()
        by_agent = any(failure.exitcode != -signal.SIGTERM for failure in result.failures.values())
        exits = [
            Exit(rank, failure.pid, failure.exitcode, now, by_agent and failure.exitcode == -signal.SIGTERM)
            for rank, failure in result.failures.items()
        ]
        size = self._worker_group.workers[0].world_size
        return verdict.judge(outlet.read(attempt_folder(self._folder, number)), exits, host(), size)

    def close(self) -> None:
        """Leave the rendezvous, unless others go on without this machine."""
        self._spec_of_run.rdzv_handler.shutdown()


def _end_stopped(pids: Sequence[int]) -> None:
    """Once a rank has failed: the agent's SIGTERM does not reach a stopped one, which it would await for 30 s."""
    if not hasattr(os, "waitid"):  # macOS
        return
    failed = [pid for pid in pids if _status(pid)]
    for pid in pids if failed else ():
        if look(this_process(-1, pid)) == "stopped":
            os.kill(pid, signal.SIGKILL)


def _status(pid: int) -> int:
    """Exit status, or signal, of a child that has ended; it is still there to be asked by the agent."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if found is None else found.si_status


def _why(found: Verdict) -> str:
    first = found.first
    return f"rank {first.rank} on {first.host} {'failed with ' if first.kind == 'raised' else ''}{first.line}"
