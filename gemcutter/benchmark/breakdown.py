"""Where the time goes: seconds of every sentence of a model, and what is left for all else.

Owns the timers around a decoder's bound sentences; refuses to know what they compute. A timer costs a microsecond or so a
call, and timers force layer-by-layer execution where a kernel could run a whole layer at once, so these times add up to more
than the benchmark's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gemcutter.model.text import Decoder
from gemcutter.ops import LAYER_OPS, MODEL_OPS

OPS = (*MODEL_OPS[:2], *LAYER_OPS, *MODEL_OPS[2:])  # that are timed, in the order of a step
REST = "rest"  # the engine, the choice of tokens, Python between the sentences


@contextmanager
def timed(decoder: Decoder) -> Iterator[dict[str, float]]:
    """Time every call of a sentence while this lasts, under its name; the decoder is as before afterwards."""
    seconds = dict.fromkeys(OPS, 0.0)
    fused = [layer.fused for layer in decoder.layers]
    places = [
        (owner, op, bound) for owner in (decoder, *decoder.layers) for op in OPS if callable(bound := getattr(owner, op, None))
    ]
    for owner, op, bound in places:
        setattr(owner, op, _timed(bound, op, seconds))
    for layer in decoder.layers:
        layer.fused = None
    try:
        yield seconds
    finally:
        for owner, op, bound in places:
            setattr(owner, op, bound)
        for layer, whole in zip(decoder.layers, fused, strict=True):
            layer.fused = whole


def measure(decoder: Decoder, run: Callable[[Callable[[], None]], float]) -> dict[str, float]:
    """Return the seconds of every sentence that ran while `run` did, and the rest of its own seconds.

    `run` gives those, and calls the function that it gets when they begin.
    """
    with timed(decoder) as seconds:
        whole = run(lambda: seconds.update(dict.fromkeys(seconds, 0.0)))
        found = {op: spent for op, spent in seconds.items() if spent}
    return found | {REST: whole - sum(found.values())}


def _timed(bound: Callable[..., Any], op: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = bound(*arguments, **named)
        seconds[op] += time.perf_counter() - started
        return found

    return call
