"""All facts, in the order in which they are shown."""

from collections.abc import Mapping

from fabriclite.doctor.accelerators import accelerators
from fabriclite.doctor.facts import Report
from fabriclite.doctor.launched import launched
from fabriclite.doctor.machine import machine
from fabriclite.doctor.problems import Seen, problems
from fabriclite.doctor.software import packages, software


def examine(env: Mapping[str, str], *, measure: bool) -> Report:
    """Look at everything.

    Args:
        env: the variables of this process.
        measure: also reduce tensors in two new processes for some seconds.
    """
    sections = [machine(), accelerators(), software(), packages(), launched(env)]
    if measure:
        from fabriclite.doctor.bandwidth import bandwidth

        sections.append(bandwidth())
    return Report(tuple(sections), problems(Seen(env, {section.title: section for section in sections})))
