"""Where values first stop being finite: asked once logits are NaN or infinite, which a sound model never gives.

Owns the second pass that finds the layer, and the look at that layer's parameters. Refuses to know requests and what to do about
it. Read `runner.py` for who asks, `sampler.py` for how it is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.sampling import is_finite, not_finite
from gemcutter.errors import NumericError
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step
from gemcutter.ops.types import has_finite_values


def locate(decoder: Decoder, step: Step, cache: PagedKVCache) -> NumericError:
    """Return the error of a step with such a row, naming the first layer with values that are not finite and its parameters.

    Runs the step once more, which writes the same keys and values to the same slots.
    """
    found = list[int]()

    def observe(index: int, x_ND: Tensor) -> None:
        if not found and not is_finite(x_ND):
            found.append(index)

    if not is_finite(decoder.embed(step.ids_N)):
        return _error("the token embeddings", bad_params(decoder, "embed."))
    decoder.forward(step, cache, observe)
    if not found:
        return _error("the final norm or the head", [*bad_params(decoder, "norm"), *bad_params(decoder, "head")])
    stage = decoder.plan.stage
    if stage is not None and not stage.holds(found[0]):
        return not_finite(f", from one of the layers 0 to {found[0]} on, which are in another stage of the pipeline")
    return _error(f"layer {found[0]}", [*bad_params(decoder, f"layers.{found[0]}."), *bad_params(decoder, "ple.")])


def bad_params(decoder: Decoder, prefix: str) -> Iterator[str]:
    """Yield the names of parameters that begin so and hold values that are not finite."""
    for name, param in decoder.params.items():
        if name.startswith(prefix) and not has_finite_values(param):
            yield name


def _error(where: str, names: Iterator[str] | list[str]) -> NumericError:
    held = ", ".join(names)
    why = f"values of {held} are not finite: the checkpoint is damaged" if held else "its parameters are finite"
    return not_finite(f", from {where} on; {why}")
