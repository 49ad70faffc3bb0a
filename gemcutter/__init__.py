"""gemcutter: the inference engine for the Gemma 4 family.

    import gemcutter
    model = gemcutter.load("demo")
    print(model.chat([{"role": "user", "content": "What is a lantern?"}]).text)

Names resolve lazily, so that `import gemcutter` and `gemcutter.plan` cost no torch. Read `api.py` for what `load` gives.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemcutter.errors import CapacityError, CheckpointError, ConfigError, GemcutterError, KernelError, RequestError
from gemcutter.gc_pause import collector_paused

if TYPE_CHECKING:
    from gemcutter.api import Model, PreparedRequest, load
    from gemcutter.completion import Chunk, Completion, RequestMetrics, Stream
    from gemcutter.engine.engine import Engine
    from gemcutter.engine.request import FinishReason, Request
    from gemcutter.engine.sampler import LogitsProcessor
    from gemcutter.engine.sampling_params import SamplingParams
    from gemcutter.generate_options import GenerateOptions
    from gemcutter.scoring import Score
    from gemcutter.text.grammar import Constraint
    from gemcutter.text.tool_calls import ToolCall

__version__ = "0.1.0"

_HOMES = {
    "load": "api",
    "Model": "api",
    "GenerateOptions": "generate_options",
    "PreparedRequest": "api",
    "Chunk": "completion",
    "Completion": "completion",
    "RequestMetrics": "completion",
    "Score": "scoring",
    "Stream": "completion",
    "Engine": "engine.engine",
    "Request": "engine.request",
    "FinishReason": "engine.request",
    "LogitsProcessor": "engine.sampler",
    "SamplingParams": "engine.sampling",
    "Constraint": "text.grammar",
    "ToolCall": "text.tool_calls",
}

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "Constraint",
    "Engine",
    "FinishReason",
    "GemcutterError",
    "GenerateOptions",
    "KernelError",
    "LogitsProcessor",
    "Model",
    "PreparedRequest",
    "Request",
    "RequestError",
    "RequestMetrics",
    "SamplingParams",
    "Score",
    "Stream",
    "ToolCall",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gemcutter' has no attribute {name!r}")
    with collector_paused():
        return getattr(import_module(f"gemcutter.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names and the module's own attributes, without what this file imports for itself."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
