"""What a checkpoint says about stopping and sampling: three sources of stop ids, suppressed ids, and when it samples at all.

Uses the demo's tokenizer (4,096 pieces). Read `gemcutter/defaults.py` for the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gemcutter import config as configs
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, shrink, spell_config
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.errors import ConfigError, RequestError
from gemcutter.generation_config import ENDS, MEDIA, Defaults
from gemcutter.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(DEMO_FOLDER)
VOCAB = 4096
# The published generation_config.json of the instruction-tuned models.
PUBLISHED = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106, 50]}


def ids_of(*pieces: str) -> set[int]:
    found = {TOKENIZER.id_of(piece) for piece in pieces}
    return {token for token in found if token is not None}


def read(generation: Mapping[str, Any] | None, eos: Any = (1,), vocab: int = VOCAB) -> Defaults:
    raw = spell_config(shrink(SIZES["31B"])) | {"eos_token_id": eos if isinstance(eos, int) else list(eos), "vocab_size": vocab}
    return Defaults.read(generation, configs.read(raw), TOKENIZER)


# ---- where to stop ----


def test_stop_ids_unite_config_generation_config_and_markers() -> None:
    markers = ids_of(*ENDS)
    assert len(markers) > 1
    own = {token for token in range(100, 200) if token not in markers}
    of_config, of_both, of_generation = sorted(own)[:3]
    found = read({"eos_token_id": [of_generation, of_both]}, eos=(of_config, of_both))
    assert found.stop_ids == markers | {of_config, of_both, of_generation}


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}])
def test_markers_end_a_reply_whatever_the_files_say(generation: Mapping[str, Any] | None) -> None:
    assert read(generation, eos=()).stop_ids == ids_of("<eos>", "<turn|>", "<|tool_response>")


def test_a_single_stop_id_needs_no_list() -> None:
    assert read({"eos_token_id": 321}, eos=123).stop_ids >= {321, 123}


@pytest.mark.parametrize("vocab", [VOCAB, 300])
def test_ids_outside_the_vocabulary_are_left_out(vocab: int) -> None:
    """A model may have fewer rows than its tokenizer has pieces, and a copied file may name another tokenizer's ids."""
    found = read({"eos_token_id": [299, 300, VOCAB, 262_144], "suppress_tokens": [299, 300, 262_144]}, vocab=vocab)
    inside = {token for token in {1, 299, 300, VOCAB, 262_144} | ids_of(*ENDS) if token < vocab}
    assert found.stop_ids == inside
    assert found.suppress == tuple(token for token in (299, 300) if token < vocab)


# ---- what never to say ----


@pytest.mark.parametrize("generation", [None, {}, {"suppress_tokens": None}, {"suppress_tokens": []}])
def test_placeholders_are_suppressed_by_default(generation: Mapping[str, Any] | None) -> None:
    found = read(generation).suppress
    assert found == tuple(sorted(ids_of(*MEDIA)))
    assert len(found) > 3
    assert not set(found) & read(generation).stop_ids


def test_a_file_may_name_what_to_suppress() -> None:
    assert read({"suppress_tokens": [77, 5]}).suppress == (5, 77)


# ---- how to sample ----


def test_greedy_without_a_generation_config() -> None:
    found = read(None)
    assert found.options == {}
    assert found.sampling({}) == SamplingParams(suppress=found.suppress)


def test_published_values_become_the_defaults() -> None:
    found = read(PUBLISHED)
    assert found.sampling({}) == SamplingParams(temperature=1.0, top_k=64, top_p=0.95, suppress=found.suppress)
    assert isinstance(found.options["top_k"], int)


@pytest.mark.parametrize(
    ("generation", "options"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),  # the library's own default
        ({"do_sample": True, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {}),
        ({"temperature": 0.7, "min_p": 0.1}, {"temperature": 0.7, "min_p": 0.1}),  # nobody writes it to have it ignored
        ({"top_k": 5}, {}),
        ({"temperature": None}, {}),
        ({"do_sample": None, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 2, "repetition_penalty": 1.1}, {"temperature": 2.0, "repetition_penalty": 1.1}),
    ],
)
def test_sampling_follows_do_sample(generation: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    assert read(generation).options == options


def test_callers_win() -> None:
    found = read(PUBLISHED | {"suppress_tokens": [9]})
    assert found.sampling({"temperature": 0.0}) == SamplingParams(temperature=0.0, top_k=64, top_p=0.95, suppress=(9,))
    assert found.sampling({"suppress": (), "seed": 3}).suppress == ()
    with pytest.raises(RequestError, match=r"sampling\.top_p"):
        found.sampling({"top_p": 0.0})


# ---- what is wrong with a file ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "<eos>"),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", [1, True]),
        ("eos_token_id", 1.0),
        ("suppress_tokens", {"258880": True}),
        ("suppress_tokens", ["<|image|>"]),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", [64]),
        ("top_k", 64.5),
        ("top_k", float("inf")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
        ("do_sample", 1),
    ],
)
def test_bad_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json can't be used") as caught:
        read({"do_sample": True} | {key: value})
    (problem,) = caught.value.problems
    assert key in problem
    assert repr(value) in problem


def test_all_bad_values_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        read({"do_sample": True, "eos_token_id": "x", "suppress_tokens": -1, "temperature": "hot", "top_p": 7.0})
    named = [problem.split(":")[0].removeprefix("sampling.") for problem in caught.value.problems]
    assert sorted(named) == ["eos_token_id", "suppress_tokens", "temperature", "top_p"]
