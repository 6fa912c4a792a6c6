"""The command line of this process, as one that runs the same script as a rank. Pure."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

RANK_MODULE: Final = "fabriclite.launch.rank"
_TAKES_VALUE: Final = ("-W", "-X", "--check-hash-based-pycs")
_FLAGS_THEN_MODULE: Final = re.compile(r"-([bBdEhiIOPqRsSuvVx]*)m(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What Python runs.

    Attributes:
        options: of the interpreter.
        module: ``name`` is a module's; else a file's.
        name: of what runs.
        arguments: of what runs.
    """

    options: Sequence[str] = ()
    module: bool = False
    name: str
    arguments: Sequence[str] = ()

    def as_rank(self, executable: str, safe_path: bool = False) -> list[str]:
        """The command that runs it with failures recorded from its first line on.

        Args:
            executable: the interpreter.
            safe_path: Python shall not look for modules beside the script, or in the working folder.
        """
        beside = os.getcwd() if self.module else os.path.dirname(os.path.realpath(self.name))
        # -P: the working folder must not stand before the installed fabriclite; rank.py puts `beside` there later.
        options = [*self.options, *(() if "-P" in self.options else ("-P",))]
        kind = "module" if self.module else "path"
        return [executable, *options, "-m", RANK_MODULE, "" if safe_path else beside, kind, self.name, *self.arguments]


def parse(command: Sequence[str]) -> Program | None:
    """What ``sys.orig_argv`` runs; ``None`` if that is neither a file nor a module."""
    options: list[str] = []
    rest = list(command[1:])
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        module = _FLAGS_THEN_MODULE.fullmatch(word)
        if module:
            options += [f"-{module[1]}"] if module[1] else []
            name = module[2] or (rest.pop(0) if rest else "")
            return Program(options=options, module=True, name=name, arguments=rest) if name else None
        if word == "-" or (re.fullmatch(r"-[a-zA-Z]*c.*", word) and not word.startswith(("-W", "-X"))):
            return None
        options.append(word)
        if word in _TAKES_VALUE and rest:
            options.append(rest.pop(0))
    return Program(options=options, name=rest[0], arguments=rest[1:]) if rest else None
