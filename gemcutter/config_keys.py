"""A typed reader of one JSON object of a `config.json`, which every part of a config shares.

Owns the checks of single values and the keys that never matter. Refuses to know which keys a part has: `config.py` and
`tower_config.py` ask for them by name. Standard library only.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Keys that say nothing about the decoder's maths: training, bookkeeping, library internals, media token ids.
IGNORED = frozenset(
    """
    _attn_implementation _experts_implementation _name_or_path add_cross_attention architectures attention_dropout
    attn_implementation audio_token_id auto_map begin_suppress_tokens boa_token_id boa_token_index boi_token_id
    boi_token_index chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id eoa_token_id
    eoa_token_index eoi_token_id eoi_token_index finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label image_token_id image_token_index initializer_range is_causal is_decoder
    is_encoder_decoder is_heterogeneous label2id license_name mm_tokens_per_image model_name output_attentions
    output_hidden_states prefix problem_type pruned_heads remove_invalid_values return_dict sep_token_id suppress_tokens
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript transformers_version
    unsloth_fixed unsloth_tag unsloth_version use_bfloat16 use_cache video_token_id vision_soft_tokens_per_image
    """.split()  # noqa: SIM905
)


class Keys:
    """The keys of one JSON object: hands out typed values, and reports what was wrong or never asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.raw, self.where, self.problems = raw, where, problems
        self.seen: set[str] = set()

    def problem(self, key: str, text: str) -> None:
        self.problems.append(f"{self.where}{key}: {text}")

    def has(self, key: str) -> bool:
        self.seen.add(key)
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**31) -> int:
        if not self.has(key):
            if default is None:
                self.problem(key, "missing; a Gemma 4 config needs this integer")
            return low if default is None else default
        value = self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(key, f"expected an integer from {low} to {high}, found {value!r}")
            return low if default is None else default
        return value

    def number(self, key: str, default: float, low: float = 0.0) -> float:
        if not self.has(key):
            return default
        value = self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= low:
            self.problem(key, f"expected a finite number above {low:g}, found {value!r}")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        if not isinstance(self.raw[key], bool):
            self.problem(key, f"expected true or false, found {self.raw[key]!r}")
            return default
        return bool(self.raw[key])

    def text(self, key: str, allowed: Sequence[str], default: str) -> str:
        if not self.has(key):
            return default
        if self.raw[key] not in allowed:
            self.problem(key, f"expected one of {', '.join(allowed)}, found {self.raw[key]!r}")
            return default
        return str(self.raw[key])

    def table(self, key: str) -> Mapping[str, Any]:
        if not self.has(key):
            return {}
        if not isinstance(self.raw[key], dict):
            self.problem(key, f"expected an object, found {type(self.raw[key]).__name__}")
            return {}
        return dict(self.raw[key])

    def ids(self, key: str) -> tuple[int, ...]:
        if not self.has(key):
            return ()
        value = self.raw[key]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            self.problem(key, f"expected a token id or a list of them, found {value!r}")
            return ()
        return tuple(values)

    def refuse_rest(self, ignore: Sequence[str]) -> None:
        for key in sorted(self.raw.keys() - self.seen - IGNORED):
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore):
                self.problem(key, f"unknown key ({self.raw[key]!r:.60}); if it can't change the maths, pass --ignore {key}")
