"""What it costs to hold a reply to a grammar: making the vocabulary, compiling, and the mask of every token.

Owns the scenes (schemas, tools, a regex, a choice) and a walk through each: tokens are drawn at random from those that are
allowed, or a text is followed. Times are given part by part, since only the last one is on the engine's thread. Refuses to know
models. Read `gemcutter/engine/grammar_mask.py` for what is timed.

    python bench/grammar_masks.py FOLDER --steps 2000

FOLDER holds a checkpoint's tokenizer.json, or Gemma 4's gemma4_tokens.json.xz, gemma4_merges.u32le.xz and special_tokens.json.
"""

from __future__ import annotations

import argparse
import array
import json
import lzma
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.grammar_masks` has it

from gemcutter.engine.grammar_mask import fill_mask
from gemcutter.errors import GemcutterError
from gemcutter.text.grammar import Constraint, Grammar, build_grammar
from gemcutter.text.grammar_compiler import CompiledGrammar, GrammarCompiler
from gemcutter.text.tokenizer import Tokenizer

ENDS = ("<turn|>", "<eos>", "<|tool_response>")
PARTS = ("step", "mask", "unpack", "apply")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder. Raises OSError or CheckpointError."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    pieces: list[str] = json.loads(lzma.decompress((folder / "gemma4_tokens.json.xz").read_bytes()))
    ids = array.array("I", lzma.decompress((folder / "gemma4_merges.u32le.xz").read_bytes()))
    if sys.byteorder == "big":
        ids.byteswap()
    merges = [f"{pieces[left]} {pieces[right]}" for left, right in zip(ids[::2], ids[1::2], strict=True)]
    special = json.loads((folder / "special_tokens.json").read_text(encoding="utf-8"))
    numbers = {piece: id for id, piece in enumerate(pieces)}
    return Tokenizer.build(pieces, merges, markers=[numbers[marker["piece"]] for marker in special.values()])


def person() -> dict[str, Any]:
    """Return a schema as applications have it."""
    text = {"type": "string", "maxLength": 80}
    address = {
        "type": "object",
        "properties": {"street": text, "city": text},
        "required": ["city"],
        "additionalProperties": False,
    }
    properties = {
        "name": text,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", "unknown"]},
        "tags": {"type": "array", "items": text, "maxItems": 5},
        "address": address,
    }
    return {"type": "object", "properties": properties, "required": ["name", "age", "mood"], "additionalProperties": False}


def tools(count: int) -> list[dict[str, Any]]:
    """Return declarations of so many functions."""
    return [{"type": "function", "function": {"name": f"function_{place}", "parameters": person()}} for place in range(count)]


def scenes() -> dict[str, Grammar]:
    """Return the grammars that are timed, by name."""
    wide = {"type": "object", "properties": {f"key_{place}": {"type": "integer"} for place in range(60)}}
    wanted: dict[str, tuple[Constraint | None, Sequence[Mapping[str, Any]]]] = {
        "JSON, 7 properties": (Constraint("json_schema", json.dumps(person())), ()),
        "JSON, 60 optional ones": (Constraint("json_schema", json.dumps(wide)), ()),
        "JSON object": (Constraint("json_object"), ()),
        "regex": (Constraint("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}( [a-z]{1,12}){1,40}"), ()),
        "choice of 200": (Constraint("choice", tuple(f"answer number {place}" for place in range(200))), ()),
        "1 tool": (None, tools(1)),
        "120 tools": (None, tools(120)),
    }
    found = {name: build_grammar(constraint, each, "required" if each else "auto") for name, (constraint, each) in wanted.items()}
    return {name: grammar for name, grammar in found.items() if grammar is not None}


@dataclass(slots=True)
class Times:
    """Seconds of each part of every mask."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def shown(self) -> dict[str, dict[str, float]]:
        """Return the median, the 99th percentile and the most, in microseconds, of each part and of what the engine waits for."""
        columns = {name: np.array(values) for name, values in self.parts.items()}
        columns["off the engine's thread"] = columns["step"] + columns["mask"] + columns["unpack"]
        return {
            name: {
                "median_us": float(np.median(each)) * 1e6,
                "p99_us": float(np.quantile(each, 0.99)) * 1e6,
                "max_us": float(each.max()) * 1e6,
            }
            for name, each in columns.items()
        }


def walk(compiled: CompiledGrammar, ends: frozenset[int], steps: int, vocab: int) -> Times:
    """Return the times of so many masks along random replies, each from the grammar's start to its end."""
    chooser, times, logits_V = random.Random(0), Times(), torch.zeros(vocab)
    matcher, mask_V = compiled.matcher.deep_copy(), np.empty(vocab, np.float32)
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(compiled.first, np.uint8), bitorder="little"))
    while len(times.parts["mask"]) < steps:
        token = int(allowed[chooser.randrange(len(allowed))])
        if token in ends:
            matcher = compiled.matcher.deep_copy()
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(compiled.first, np.uint8), bitorder="little"))
            continue
        marks = [time.perf_counter()]
        matcher.validate_tokens([token])
        matcher.consume_token(token)
        marks.append(time.perf_counter())
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        marks.append(time.perf_counter())
        fill_mask(bits, mask_V)
        marks.append(time.perf_counter())
        logits_V += torch.from_numpy(mask_V)
        marks.append(time.perf_counter())
        for name, start, stop in zip(PARTS, marks, marks[1:], strict=False):
            times.parts[name].append(stop - start)
        allowed = np.flatnonzero(mask_V == 0)
    return times


def measure(tokenizer: Tokenizer, steps: int) -> dict[str, Any]:
    """Return the times of the vocabulary, and of every scene's compilation and masks."""
    ends = frozenset(id for piece in ENDS if (id := tokenizer.id_of(piece)) is not None)
    compiler, started = GrammarCompiler(tokenizer, ends), time.perf_counter()
    compiler.vocabulary()
    found: dict[str, Any] = {"vocabulary": tokenizer.num_ids, "vocabulary_s": time.perf_counter() - started, "scenes": {}}
    for name, grammar in scenes().items():
        started = time.perf_counter()
        compiled = compiler.compile(grammar)
        compiled_s = time.perf_counter() - started
        started = time.perf_counter()
        compiled.matcher.deep_copy()
        copy_s = time.perf_counter() - started
        masks = walk(compiled, ends, steps, len(compiled.first) * 8).shown()
        found["scenes"][name] = {"compile_s": compiled_s, "copy_s": copy_s, "masks": masks}
    return found


def show(found: Mapping[str, Any]) -> None:
    """Print the times as a table."""
    print(f"vocabulary of {found['vocabulary']:,} ids: {found['vocabulary_s']:.2f} s, once a model")
    print(f"{'':24}{'compile':>10}{'copy':>9}   median / p99 of a mask, us")
    for name, scene in found["scenes"].items():
        parts = "  ".join(f"{part} {each['median_us']:.0f} / {each['p99_us']:.0f}" for part, each in scene["masks"].items())
        print(f"{name:24}{scene['compile_s'] * 1e3:7.1f} ms{scene['copy_s'] * 1e6:6.0f} us   {parts}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 where the folder holds no vocabulary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the vocabulary is")
    parser.add_argument("--steps", type=int, default=2000, help="masks a scene (default: 2000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        found = measure(read_tokenizer(options.folder), options.steps)
    except (OSError, GemcutterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found)) if options.json else show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
