"""curve.png and report.html: the curves of a run, its summary, and a few samples from its beginning and end."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import orjson

mpl.use("Agg")
from matplotlib import pyplot as plt

# A curve is smoothed over this share of the run.
SMOOTHING = 0.05
SAMPLES_SHOWN = 6

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>polyhead: {name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ border: 1px solid #ddd; padding: .25rem .6rem;
text-align: left; vertical-align: top }} td.text {{ font-family: ui-monospace, monospace; white-space: pre-wrap }}
img {{ max-width: 100% }} .ok {{ color: #17692f }} .no {{ color: #a02020 }}
</style></head><body>
<h1>{name}</h1>
<p>Mean reward {reward_first:.3f} in the first steps, {reward_last:.3f} in the last, after {steps} steps in
{wall_s:.0f} s.</p>
<img alt="Curves of the run" src="data:image/png;base64,{curve}">
<h2>Before</h2>{before}<h2>After</h2>{after}
<h2>Summary</h2>{summary}
</body></html>
"""


def write(run_dir: Path, summary: dict[str, Any], steps: Sequence[dict[str, Any]]) -> None:
    """Writes run_dir/curve.png and run_dir/report.html from the step metrics and samples.jsonl."""
    png = _curves(steps)
    (run_dir / "curve.png").write_bytes(png)
    samples = [orjson.loads(line) for line in (run_dir / "samples.jsonl").read_bytes().splitlines()]
    page = _PAGE.format(
        name=html.escape(run_dir.name),
        curve=base64.b64encode(png).decode(),
        before=_samples(samples[:SAMPLES_SHOWN]),
        after=_samples(samples[-SAMPLES_SHOWN:]),
        summary=_summary(summary),
        **{key: summary[key] for key in ("reward_first", "reward_last", "steps", "wall_s")},
    )
    (run_dir / "report.html").write_text(page)


def _curves(steps: Sequence[dict[str, Any]]) -> bytes:
    panels = [
        ("mean reward", [line["reward_mean"] for line in steps]),
        ("staleness (max of a step)", [line["staleness_max"] for line in steps]),
        ("mismatch_kl (trainer against rollout)", [line["mismatch_kl"] for line in steps]),
        ("seconds per step", [line["step_s"] for line in steps]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    numbers = [line["step"] for line in steps]
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        axis.plot(numbers, values, color="#bbb", linewidth=0.6)
        axis.plot(numbers, _smooth(values), color="#1f5fa8", linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a trailing window."""
    window = max(1, int(len(values) * SMOOTHING))
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{sample['step']}</td><td class=text>{html.escape(str(sample['prompt']))}</td>"
        f"<td class=text>{html.escape(sample['completion'])}</td>"
        f"<td class=text>{html.escape(str(sample['label']))}</td>"
        f"<td class={'ok' if sample['reward'] > 0 else 'no'}>{sample['reward']:g}</td>"
        f"<td>{' '.join(span[0] for span in sample['spans'])}</td></tr>"
        for sample in samples
    )
    head = "<tr><th>step<th>prompt<th>completion<th>label<th>reward<th>weight versions</tr>"
    return f"<table>{head}{rows}</table>"


def _summary(summary: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td class=text>{html.escape(orjson.dumps(value).decode())}</td></tr>"
        for key, value in summary.items()
    )
    return f"<table>{rows}</table>"
