"""One word per concept, and the field's own: names that the project gave up stay out of code, messages and documentation.

Owns `REPLACED`, each old name with what stands in its place. A page about history (CHANGELOG.md, docs/log.md) may use them.
Read docs/glossary.md for the words that are the project's own, and `test_architecture.py` for the rules of structure.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = (".py", ".h", ".cpp")
CODE = sorted(
    path for folder in ("gemcutter", "csrc", "bench", "tools") for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
)
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = {"CHANGELOG.md", "docs/log.md"}

# Whole words; case counts. Each of the first column is what a reader of vLLM, llama.cpp or PyTorch would not have guessed.
REPLACED = {
    "prefix_cache_entries": "prefix_cache_bytes",
    "gauge": "benchmark",
    "lexicon": "text_assets",
    "PagedPool": "PagedKVCache",
    "PageBook": "PageAllocator",
    "PageCount": "PoolSize",
    "row_start": "query_start",
    "Numerics": "Precision",
    "Site": "KernelSite",
    "Provider": "KernelImpl",
    "providers": "kernels",
    "choose": "select_kernel",
    "Viewer": "CpuAttnMetadata",
    "Compact": "KEqVCache",
    "Slate": "GraphBuffers",
    "slate": "GraphBuffers",
    "Staging": "PinnedBuffers",
    "Flight": "CapturedStep",
    "Walk": "EagerStep",
    "Mail": "EventRouter",
    "Draws": "SamplingTensors",
    "Timings": "RequestMetrics",
    "Finish": "FinishReason",
    "Sampling": "SamplingParams",
    "Striped": "GpuPackedWeight",
    "striped": "packed",
    "stripe": "vector",
    "stripes": "vectors",
    "Tiled": "CpuPackedWeight",
    "Wish": "ConvertOptions",
    "Beside": "sidecar files",
    "squash": "softcap",
    "widen_rows": "dequantize_rows",
    "FAN": "NUM_NORMS",
    "project": "qkv",
    "attend": "attention",
    "mix": "attn_out",
    "inject": "ple_gate",
    "sentences": "layer ops",
    "verb": "op or command",
    "verbs": "ops or commands",
    "NEXT_NORM": "the second result of Layer.forward",
    "Entering": "ActivationBuffer",
    "crew": "thread pool",
}
# Words of plain English that are also old names: they may stand in prose, and not as names in code.
PLAIN = {"project", "choose", "mix", "inject", "sentences", "attend", "providers"}


def old_names(text: str, words: set[str]) -> list[str]:
    """Return the old names among `words` that stand in a text, each with its successor."""
    found = sorted(set(re.findall(r"[A-Za-z_]+", text)) & words)
    return [f"{word} (now {REPLACED[word]})" for word in found]


def without_prose(text: str, suffix: str) -> str:
    """Return source without comments and strings, where plain words may be used in their plain meaning."""
    if suffix == ".py":
        return re.sub(r'"""[\s\S]*?"""|"(?:[^"\\\n]|\\.)*"|#.*', "", text)
    return re.sub(r'//.*|/\*[\s\S]*?\*/|"(?:[^"\\\n]|\\.)*"', "", text)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_uses_no_name_that_was_given_up(path: Path) -> None:
    text = path.read_text()
    assert old_names(text, REPLACED.keys() - PLAIN) == []
    assert old_names(without_prose(text, path.suffix), PLAIN) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_no_name_that_was_given_up(path: Path) -> None:
    if str(path.relative_to(ROOT)) in HISTORY:
        return
    names = " ".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`", path.read_text()))  # the rest is plain English
    assert old_names(names, set(REPLACED)) == []


def test_the_rule_finds_what_it_forbids() -> None:
    assert old_names("a Slate of rows", {"Slate"}) == ["Slate (now GraphBuffers)"]
    assert old_names(without_prose('def mix(x):\n    """Feed."""  # feed\n', ".py"), PLAIN) == ["mix (now attn_out)"]
    assert len(CODE) > 150
    assert len(PAGES) > 10
