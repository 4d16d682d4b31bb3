"""The curves of `make learn`: mean reward over the seeds, and between which values they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(path: Path, rows: Mapping[str, Any], panels: Mapping[str, Sequence[str]], width: int) -> None:
    """One panel for each of `panels`, which name the variants in it; a point for each `width` steps."""
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4.5), layout="constrained", sharey=True, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in (name for name in names if name in rows):
            curves = [each["reward"] for each in rows[name]["seeds"].values()]
            points = list(zip(*curves, strict=False))
            steps = [width * (number + 1) for number in range(len(points))]
            (line,) = axis.plot(steps, [sum(point) / len(point) for point in points], label=name, linewidth=1.4)
            axis.fill_between(
                steps, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.12, linewidth=0
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, loc="lower right")
    axes.flat[0].set_ylabel("mean reward", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
