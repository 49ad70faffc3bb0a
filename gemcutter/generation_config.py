"""What a checkpoint says about generation: where to stop, what never to say, how to sample.

Owns generation_config.json and the markers that end a turn whatever a file says; refuses to know how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemcutter.config import ModelConfig
from gemcutter.engine.sampling_params import FIELDS, SamplingParams
from gemcutter.errors import ConfigError
from gemcutter.text.tokenizer import Tokenizer

ENDS = ("<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>")  # files list one, two or all three; the models end on any
# Placeholders that only a processor may write; models otherwise put them into plain text now and then.
MEDIA = ("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>")
SAMPLED = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}


@dataclass(frozen=True, slots=True)
class Defaults:
    """Stop ids, suppressed ids and sampling fields of one checkpoint; greedy unless its generation_config samples.

    `stops` says of every stop id who asks for it.
    """

    stops: Mapping[int, tuple[str, ...]]
    suppress: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end a reply."""
        return frozenset(self.stops)

    @classmethod
    def read(
        cls,
        generation: Mapping[str, Any] | None,
        config: ModelConfig,
        tokenizer: Tokenizer,
        end_of_turn: int | None = None,
    ) -> Defaults:
        """Unite generation_config.json (None if absent), config.json, the tokenizer's markers and its eos_token, and the marker
        that the chat template puts after a reply. Raises ConfigError.
        """
        raw, problems = generation or {}, list[str]()
        sources = {
            "generation_config": _ids(raw, "eos_token_id", problems),
            "config": config.eos_token_ids,
            "tokenizer's eos_token": [tokenizer.id_of(tokenizer.special_tokens.get("eos_token", ""))],
            "chat template": [end_of_turn],
            "markers of this family": [tokenizer.id_of(piece) for piece in ENDS],
        }
        media = [token for piece in MEDIA if (token := tokenizer.id_of(piece)) is not None]
        suppress = _ids(raw, "suppress_tokens", problems) or media
        options = _sampled(raw, problems)
        if problems:
            raise ConfigError("generation_config.json can't be used", problems)
        vocab = config.text.vocab_size
        stops = dict[int, tuple[str, ...]]()
        for source, ids in sources.items():
            for token in ids:
                if token is not None and token < vocab:
                    stops[token] = (*stops.get(token, ()), source)
        return cls(stops, tuple(sorted(token for token in suppress if token < vocab)), options)

    def sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        """Return SamplingParams from the checkpoint's defaults and a caller's options, which win. Raises RequestError."""
        return SamplingParams(**{**self.options, "suppress": self.suppress, **options})


def _sampled(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Read the sampling fields; none count unless the file samples: it says so, or names a temperature."""
    samples = raw.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        problems.append(f"do_sample: expected true or false, found {samples!r}")
    options = dict[str, Any]()
    for name, kind in SAMPLED.items():
        value = raw.get(name)
        holds, want = FIELDS[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            problems.append(f"{name}: expected {want}, found {value!r}")
        else:
            options[name] = kind(value)
    if not (raw.get("temperature") is not None if samples is None else samples):
        return {}
    return {"temperature": 1.0, **options}


def _ids(raw: Mapping[str, Any], key: str, problems: list[str]) -> list[int]:
    value = raw.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in values):
        problems.append(f"{key}: expected a token id or a list of them, found {value!r}")
        return []
    return values
