"""A picture of latency against rate.

Owns the drawing (matplotlib's, the extra `plot`). Refuses to compute. Read `metrics.py` for what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemcutter.bench_serve.metrics import measure, pace
from gemcutter.bench_serve.report import Outcome
from gemcutter.errors import RequestError

PANELS = (("ttft", "time to first token, s"), ("tpot", "time per output token, s"), ("e2el", "whole request, s"))


def check_plot(path: Path) -> None:
    """Raise RequestError where matplotlib is missing or can't write such a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("--plot needs matplotlib: pip install 'gemcutter[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise RequestError(f"--plot: expected a file that ends in one of {', '.join(sorted(known))}, found {path.name!r}")


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw median and p99 of three latencies against the rate that was served; overloaded runs have hollow marks."""
    from matplotlib.figure import Figure

    paces = [pace(each.run, each.settings.request_rate) for each in outcomes]
    order = sorted(range(len(outcomes)), key=lambda index: paces[index].served)
    rates = [paces[index].served for index in order]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        spreads = [measure(outcomes[index].run, "sglang").spreads[name] for index in order]
        for percent, label in ((50, "median"), (99, "p99")):
            values = [spread.percentile(percent) for spread in spreads]
            (line,) = axes.plot(rates, values, label=label)
            for place, index in enumerate(order):
                fill = "none" if paces[index].is_overloaded else line.get_color()
                axes.plot(rates[place], values[place], "o", color=line.get_color(), markerfacecolor=fill)
        axes.set(xlabel="requests served per second", title=title, ylim=(0, None))
        axes.legend()
    how = outcomes[0].settings
    figure.suptitle(f"{how.model}: {how.dataset_name}, {how.num_prompts} requests; hollow: overloaded")
    figure.savefig(path)
