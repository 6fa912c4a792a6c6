"""What is printed of a failed run: once, last. Pure."""

from collections.abc import Sequence

from fabriclite.launch.failures.record import Failure, Note

_HEAD = {
    "raised": "failed first, on host {host} (pid {pid}):",
    "ended": "{line}, on host {host} (pid {pid}).",
    "vanished": "ended without a word (killed, or os._exit), on host {host} (pid {pid}).",
    "hung": "waited in vain for the others, on host {host} (pid {pid}):",
    "stopped": "{line}, on host {host} (pid {pid}).",
    "silent": "{line}, on host {host} (pid {pid}).",
    "interrupted": "was interrupted (Ctrl-C), on host {host} (pid {pid}).",
}
_LONGEST = 200  # characters of another rank's error


def page(first: Failure, notes: Sequence[Note]) -> str:
    """The first failure with its traceback; then one line for each other rank that failed; then what they were at.

    What the others were at is told where the first failure alone does not explain itself: a hang, a sudden end.
    """
    who = f"Rank {first.rank} of {first.size}" if first.rank >= 0 else f"A rank of {first.size}"
    parts = [f"{who} {_HEAD[first.kind].format(host=first.host, line=first.line, pid=first.pid)}"]
    if first.kind == "interrupted":
        return parts[0]
    if first.text:
        parts.append(f"\n{first.text.rstrip()}")
    others = sorted((note for note in notes if note.rank != first.rank), key=lambda note: note.rank)
    if first.kind != "raised":
        parts += _doing(first, notes, others)
    then = [f"Then rank {n.rank} on {n.host} (pid {n.pid}): {n.line[:_LONGEST]}" for n in others if n.line]
    return "\n".join([*parts, *([""] if then else []), *then])


def _doing(first: Failure, notes: Sequence[Note], others: Sequence[Note]) -> list[str]:
    seen = {rank: what for note in notes for rank, what in note.seen.items() if rank != first.rank}
    at = {note.rank: note.doing.rstrip() for note in others if note.doing and note.rank not in seen}
    lines = [
        f"rank {rank}: {seen[rank]}" if rank in seen else f"rank {rank}:\n{at[rank]}" for rank in sorted(at | seen)
    ]
    return ["\nWhat the others were doing:", *lines] if lines else []
