"""A run in the terminal: numbers with bars, and what to know before one believes them.

Owns the layout. Refuses to compute. Read `report.py` for all numbers, `plot.py` for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemcutter.bench_serve.metrics import Spread, delays_s, measure, pace
from gemcutter.bench_serve.report import Outcome, load_fields

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
SHOWN = ((50, "median"), (90, "p90"), (99, "p99"))
WIDTH = 40  # columns of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
LATE_MS = 10.0  # of the client's own loop, from which on its times are not to be trusted


def bar(value: float, largest: float, width: int = WIDTH) -> str:
    """Return a bar of a value, `width` columns for the largest one."""
    eighths = round(8 * width * value / largest) if largest > 0 else 0
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def show(outcome: Outcome) -> str:
    """Return one run as text: rates, the four latencies under sglang's rules, and remarks."""
    return "\n".join([*_rates(outcome), "", *_latencies(outcome), *(f"note: {each}" for each in remarks(outcome))])


def _rates(outcome: Outcome) -> Iterator[str]:
    found, speed, how = measure(outcome.run, "sglang"), pace(outcome.run, outcome.settings.request_rate), outcome.settings
    offered = "all at once" if speed.offered is None else f"{speed.offered:g} offered"
    over = ", overloaded" if speed.is_overloaded else ""
    limit = f", at most {how.max_concurrency} at once" if how.max_concurrency else ""
    yield f"{len(found.samples)} of {outcome.planned_turns} requests in {outcome.run.duration_s:.1f} s{limit}"
    yield f"served       {speed.served:10.3f} requests/s  ({offered}{over})"
    inputs = sum(each.usage_count("prompt_tokens") or each.prompt_len or 0 for each in outcome.succeeded)
    duration_s = outcome.run.duration_s
    rates = {"input": inputs, "output": found.output_tokens, "total": inputs + found.output_tokens}
    for name, tokens in rates.items():
        yield f"{name:12} {tokens / duration_s:10.1f} tokens/s"
    yield f"concurrency  {found.concurrency:10.2f} on average, {found.most_at_once()} at most"
    told = load_fields(outcome)
    if told["cached_tokens"] is not None:
        yield f"cached       {told['cached_tokens']:10,} of {told['prompt_tokens'] or 0:,} prompt tokens"
    if told["draft_tokens"] is not None:
        yield f"accepted     {told['accepted_draft_tokens']:10,} of {told['draft_tokens']:,} draft tokens"
    if how.goodput_ms:
        limits = ", ".join(f"{TITLES[name]} {limit:g} ms" for name, limit in how.goodput_ms.items())
        good = found.good(how.goodput_ms)
        yield f"goodput      {good / duration_s:10.3f} requests/s within {limits} ({good} of {len(outcome.run.replies)})"


def _latencies(outcome: Outcome) -> Iterator[str]:
    for name, spread in measure(outcome.run, "sglang").spreads.items():
        largest = spread.percentile(SHOWN[-1][0])
        for percent, title in SHOWN:
            value = spread.percentile(percent)
            label = f"{TITLES[name] if title == SHOWN[0][1] else '':4} {title:6}"
            yield f"{label} {1000 * value:10.1f} ms  {bar(value, largest)}".rstrip()


def remarks(outcome: Outcome) -> Iterator[str]:
    """Yield what makes the numbers other than they look."""
    told, run = load_fields(outcome), outcome.run
    late, waiting = delays_s(run.replies)
    if pace(run, outcome.settings.request_rate).is_overloaded:
        yield "requests came faster than they were served: latencies are those of a queue, and grow with the length of the run"
    if 1000 * late.percentile(99) > LATE_MS:
        yield f"the client sent requests up to {1000 * max(late.values):.0f} ms late: it lacks processor time, so times are wrong"
    if outcome.settings.max_concurrency and max(waiting.values, default=0.0) > LATE_MS / 1000:
        yield f"requests waited for --max-concurrency, {waiting.median:.2f} s in the median, which TTFT and E2E leave out"
    if told["without_usage"]:
        yield f"{told['without_usage']} replies tell no usage: sglang's rules then take as many tokens as were asked for"
    if told["without_text"]:
        yield f"{told['without_text']} replies have no text; their TTFT counts as 0"
    if told["other_length_than_asked"]:
        yield f"{told['other_length_than_asked']} replies are of another length than asked for: does the server know ignore_eos?"
    if told["empty_chunk_before_text_ms"]["median"] > LATE_MS:
        yield "streams begin with a chunk without text, which vLLM's rules take for the first token; sglang's do not"


def show_sweep(outcomes: Sequence[Outcome]) -> str:
    """Return runs at several rates as text: what was served, and the median and p99 of TTFT and TPOT, with bars of the former."""
    rows = list[tuple[str, float, Spread, Spread, bool]]()
    for each in outcomes:
        found, speed = measure(each.run, "sglang"), pace(each.run, each.settings.request_rate)
        offered = "inf" if speed.offered is None else f"{speed.offered:g}"
        rows.append((offered, speed.served, found.spreads["ttft"], found.spreads["tpot"], speed.is_overloaded))
    largest = max(spread.median for _, _, spread, _, _ in rows)
    lines = [f"{'offered':>8} {'served':>8} {'TTFT ms':>9} {'p99':>9} {'TPOT ms':>9} {'p99':>9}"]
    for offered, served, ttft, tpot, is_overloaded in rows:
        values = (ttft.median, ttft.percentile(99), tpot.median, tpot.percentile(99))
        cells = " ".join(f"{1000 * value:9.1f}" for value in values)
        over = " overloaded" if is_overloaded else ""
        lines.append(f"{offered:>8} {served:8.3f} {cells}  {bar(ttft.median, largest, 20)}{over}")
    return "\n".join(lines)
