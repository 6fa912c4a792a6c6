"""Draw what `init.py --json FILE` measured: peak memory and CPU time of a rank against the number of processes.

python benchmarks/plot_init.py benchmarks/init.json
python benchmarks/plot_init.py init.json --dtype bfloat16 --variant hf --out picture.svg
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

OUT: Final = Path(__file__).parent.parent / "docs" / "guides" / "efficient-initialization.svg"
LOOKS: Final = {
    "eager": ("plain construction, then fully_shard", "#6b7280", "o"),
    "lightning_fabric": ("lightning-fabric (several processes: other values)", "#d97706", "s"),
    "accelerate": ("accelerate (one process)", "#059669", "^"),
    "fabriclite": ("fabriclite", "#1d4ed8", "D"),
}
"""By contender: its name in the picture, color and mark."""

Rows = Sequence[dict[str, Any]]


def peak_gib(row: dict[str, Any]) -> float:
    return statistics.median(sample["peak_mib"] for sample in row["samples"]) / 1024


def seconds(row: dict[str, Any]) -> float:
    """Of CPU time: with more processes than cores, time that passes says how many cores the machine has."""
    return statistics.median(sample["cpu"] for sample in row["samples"])


def draw(rows: Rows, title: str, out: Path) -> None:
    """One column for each size; memory above, time below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # With the salt and without the date the same figures give the same file.
    mpl.rcParams.update({"svg.hashsalt": "fabriclite", "svg.fonttype": "none", "font.size": 9})
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(max(6.5, 1.2 + 2.6 * len(sizes)), 5.6), layout="constrained")
    axes = figure.subplots(2, len(sizes), squeeze=False, sharex=True)
    for column, size in enumerate(sizes):
        of_size = [row for row in rows if row["size"] == size]
        _panel(axes[0][column], of_size, peak_gib)
        _ideal(axes[0][column], of_size)
        _panel(axes[1][column], of_size, seconds)
        axes[0][column].set_title(size)
        axes[1][column].set_xlabel("processes")
    axes[0][0].set_ylabel("peak memory of a rank, GiB")
    axes[1][0].set_ylabel("CPU time of a rank, seconds")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _panel(axis: Any, rows: Rows, value: Callable[[dict[str, Any]], float]) -> None:
    for name, (label, color, mark) in LOOKS.items():
        points = sorted((row["world"], value(row)) for row in rows if row["contender"] == name)
        if points:
            axis.plot(*zip(*points, strict=True), color=color, marker=mark, label=label)
    worlds = sorted({row["world"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(worlds, [str(world) for world in worlds])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4)


def _ideal(axis: Any, rows: Rows) -> None:
    """What a rank keeps: nobody takes less."""
    parts = {row["world"]: row["samples"][0]["share_mib"] / 1024 for row in rows if row["contender"] == "fabriclite"}
    worlds = sorted(parts)
    axis.plot(worlds, [parts[w] for w in worlds], color="black", linestyle=":", linewidth=1, label="what a rank keeps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="from init.py --json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--variant", default="plain")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not find_spec("matplotlib"):
        parser.error("matplotlib must be installed, but is not: pip install matplotlib.")
    document = json.loads(options.file.read_text(encoding="utf-8"))
    wanted = {"section": "build", "dtype": options.dtype, "variant": options.variant}
    rows = [row for row in document.get("build", []) if all(row[key] == value for key, value in wanted.items())]
    if not rows:
        parser.error(f"{options.file} must hold builds of {options.dtype}, {options.variant}, but holds none.")
    draw(rows, f"Building a GPT in {options.dtype} and keeping this rank's part", options.out)
    print(options.out)


if __name__ == "__main__":
    main()
