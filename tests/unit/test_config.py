"""What a config.json may say: both spellings, every key that transformers writes, and one error for all that is wrong.

The published presets are spoilt one key at a time, then all at once, then at random: a config is read or refused by name, and
nothing else may come out. transformers is the oracle of what its own files hold. Read `test_plan.py` for what follows from it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter import config
from gemcutter.errors import ConfigError
from gemcutter.plan import Attn, derive

CONFIGS = Path(__file__).resolve().parents[1] / "goldens" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
E2B, MOE = "gemma-4-E2B-it", "gemma-4-26B-A4B-it"
Raw = dict[str, Any]


def load(name: str = E2B) -> Raw:
    raw: Raw = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return raw


def change(raw: Raw, path: str, value: Any) -> Raw:
    """Set one key of a copy, by its dotted path."""
    changed = copy.deepcopy(raw)
    *parents, key = path.split(".")
    place = changed
    for parent in parents:
        place = place[parent]
    place[key] = value
    return changed


def problems_of(raw: Raw, ignore: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Read a config that must be refused, by the reader or by the plan, and give its problems."""
    with pytest.raises(ConfigError) as caught:
        derive(config.read(raw, ignore=ignore))
    return caught.value.problems


def test_all_published_configs_are_here() -> None:
    assert len(NAMES) == 10


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_give_one_plan(name: str, digits: int) -> None:
    raw = load(name)
    expected = derive(config.read(raw))
    text = raw["text_config"]
    overrides = {"head_dim": text.pop("global_head_dim")}
    kv_heads = text.pop("num_global_key_value_heads", None)
    if text["attention_k_eq_v"]:
        overrides["num_key_value_heads"] = kv_heads
    globals_ = [index for index, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    text["per_layer_config"] = {f"{index:0{digits}d}": dict(overrides) for index in globals_}
    assert derive(config.read(raw)) == expected
    both = change(raw, "text_config.global_head_dim", overrides["head_dim"])  # said twice, alike
    assert derive(config.read(both)) == expected


def test_a_flat_config_is_its_nested_one() -> None:
    raw = load()
    assert derive(config.read(raw["text_config"])) == derive(config.read(raw))


def test_what_surrounds_the_decoder_is_noted() -> None:
    found = config.read(load())
    assert (found.model_type, found.dtype, found.eos_token_ids, found.towers) == (
        "gemma4",
        "bfloat16",
        (1, 106),
        ("vision", "audio"),
    )
    assert (found.quantization, found.is_drafter, found.text.bos_token_id) == (None, False, 2)
    quantized = config.read(change(load(), "quantization_config", {"quant_method": "x"}))
    assert quantized.quantization == {"quant_method": "x"}
    assert config.read(change(load(), "quantization", {"bits": 4})).quantization == {"bits": 4}
    assert config.read(change(load(), "vision_config", None)).towers == ("audio",)
    untied = change(load(), "tie_word_embeddings", False)
    assert derive(config.read(untied)).num_params() - derive(config.read(load())).num_params() == 262144 * 1536
    assert derive(config.read(untied)).read_bytes() == derive(config.read(load())).read_bytes()


def test_layer_types_may_be_left_to_a_pattern() -> None:
    raw = load()
    del raw["text_config"]["layer_types"]
    kinds = [layer.attn for layer in derive(config.read(change(raw, "text_config.sliding_window_pattern", 5))).layers]
    assert [index for index, kind in enumerate(kinds) if kind is Attn.GLOBAL] == [4, 9, 14, 19, 24, 29, 34]
    kinds = [layer.attn for layer in derive(config.read(raw)).layers]  # a period of 6, and the last layer is global
    assert [index for index, kind in enumerate(kinds) if kind is Attn.GLOBAL] == [5, 11, 17, 23, 29, 34]


def test_rope_keys_may_be_flattened() -> None:
    raw = load()
    raw["text_config"].pop("rope_parameters")
    assert derive(config.read(raw)) == derive(config.read(load()))
    raw["text_config"] |= {"rope_theta": 5e5, "rope_local_base_freq": 2e4}
    ropes = {(layer.attn, layer.rope.theta, layer.rope.pairs) for layer in derive(config.read(raw)).layers}
    assert ropes == {(Attn.GLOBAL, 5e5, 64), (Attn.SLIDING, 2e4, 128)}


def test_the_older_name_of_the_expert_width_is_read() -> None:
    raw = load(MOE)
    raw["text_config"]["expert_intermediate_size"] = raw["text_config"].pop("moe_intermediate_size")
    assert derive(config.read(raw)) == derive(config.read(load(MOE)))


def test_experts_without_their_block_are_left_out() -> None:
    assert {layer.moe for layer in derive(config.read(change(load(MOE), "text_config.enable_moe_block", False))).layers} == {None}


# Every line: where, what it is set to, and what the one problem must say beside the key.
TEXT_SPOILS: list[tuple[str, Any, str]] = [
    *[
        ("hidden_size", bad, "expected an integer from 1")
        for bad in (0, -5, True, "1536", 1536.0, math.nan, math.inf, [1536], 10**30)
    ],
    *[("num_attention_heads", bad, "expected an integer") for bad in (False, {}, "8", 2**31 + 1)],
    *[("num_kv_shared_layers", bad, "expected an integer from 0") for bad in (-1, 0.5, True)],
    *[("rms_norm_eps", bad, "expected a finite number above 0") for bad in (0, -1e-6, math.nan, math.inf, True, "1e-6")],
    *[("final_logit_softcapping", bad, "expected a finite number") for bad in (-30.0, math.inf, [30.0])],
    *[("use_double_wide_mlp", bad, "expected true or false") for bad in (1, "true", [])],
    *[("attention_k_eq_v", bad, "expected true or false") for bad in (0, "false")],
    ("attention_bias", True, "no Gemma 4 has attention biases"),
    ("hidden_activation", "silu", "expected one of gelu_pytorch_tanh"),
    ("use_bidirectional_attention", "all", "makes an encoder"),
    ("use_bidirectional_attention", "left", "expected one of vision, all"),
    ("model_type", "gemma2", "expected one of gemma4_text"),
    ("num_kv_shared_layers", 36, "36 of 35 layers can't be shared"),
    ("vocab_size_per_layer_input", 0, "0 rows, but hidden_size_per_layer_input asks"),
    ("layer_types", ["full_attention"], "names 1 layers, but num_hidden_layers is 35"),
    ("layer_types", ["sliding_attention"] * 35, "the last layer must be 'full_attention'"),
    ("layer_types", ["chunked_attention"] * 35, "expected a list of"),
    *[("layer_types", bad, "expected a list of") for bad in ("full_attention", 7, [None] * 35, {"0": "full_attention"})],
    ("eos_token_id", [1, -2], "expected a token id or a list of them"),
    ("eos_token_id", True, "expected a token id"),
    ("rope_parameters", [], "expected an object, found list"),
    ("rope_scaling", {"factor": 2}, "not part of Gemma 4"),
    ("rope_parameters.full_attention.rope_type", "yarn", "expected one of default, proportional"),
    ("rope_parameters.full_attention.partial_rotary_factor", 1.5, "does not go with"),
    ("rope_parameters.sliding_attention.partial_rotary_factor", 0.5, "does not go with rope_type 'default'"),
    ("rope_parameters.full_attention.rope_theta", -1, "expected a finite number"),
    ("rope_parameters.full_attention.beta", 1, "unknown key (1)"),
    ("rope_parameters.chunked", {}, "expected objects for sliding_attention and full_attention"),
    ("per_layer_config", [], "expected an object, found list"),
    *[(f"per_layer_config.{layer}", {"head_dim": 512}, "a layer from 0 to 34") for layer in ("35", "-1", "x", "1e3", "")],
    ("per_layer_config.4", 512, "a layer from 0 to 34, found 512"),
    ("per_layer_config.4", {"head_dim": 0}, "expected an integer from 1"),
    ("per_layer_config.4", {"head_dim": 512, "sliding_window": 3}, "sliding_window: unknown key (3)"),
    ("attention_sinks", True, "unknown key (True); if it can't change the maths, pass --ignore attention_sinks"),
]
TOP_SPOILS: list[tuple[str, Any, str]] = [
    ("text_config", 5, "expected an object, found int"),
    ("tie_word_embeddings", "yes", "expected true or false"),
    ("vision_config", 3, "expected an object"),
    ("quantization_config", "int4", "expected an object, found str"),
    ("mixture", {}, "unknown key ({})"),
]


def spoilable(path: str) -> Raw:
    """Build E2B with the tables that a path goes through."""
    return change(load(), "text_config.per_layer_config", {}) if "per_layer_config." in path else load()


@pytest.mark.parametrize(("path", "bad", "text"), TEXT_SPOILS, ids=lambda value: str(value)[:40])
def test_a_bad_key_of_the_decoder_is_the_one_problem(path: str, bad: Any, text: str) -> None:
    (problem,) = problems_of(change(spoilable(path), f"text_config.{path}", bad))
    assert problem.startswith(f"text_config.{path}")
    assert text in problem


@pytest.mark.parametrize(("path", "bad", "text"), TOP_SPOILS, ids=lambda value: str(value)[:40])
def test_a_bad_key_beside_the_decoder_is_named_first(path: str, bad: Any, text: str) -> None:
    problem = problems_of(change(load(), path, bad))[0]
    assert problem.startswith(f"{path}: ")
    assert text in problem


def test_all_problems_come_at_once() -> None:
    raw, keys = change(load(), "text_config.per_layer_config", {}), list[str]()
    first = {path: bad for path, bad, _ in reversed(TEXT_SPOILS) if not path.startswith(("rope_parameters.", "per_layer_config"))}
    for path, bad in first.items():
        raw = change(raw, f"text_config.{path}", bad)
        keys.append(f"text_config.{path}")
    raw = change(change(raw, "mixture", 1), "text_config.per_layer_config.99", {})
    keys += ["mixture", "text_config.per_layer_config.99"]
    with pytest.raises(ConfigError) as caught:
        config.read(raw, "some/config.json")
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == sorted(keys)
    assert caught.value.summary == f"some/config.json does not describe a Gemma 4 model ({len(keys)} problems)"


def test_experts_must_be_consistent_and_complete() -> None:
    raw = change(load(MOE), "text_config.top_k_experts", 200)
    assert problems_of(raw) == ("text_config.top_k_experts: 200 of 128 experts can't be chosen",)
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        raw["text_config"][key] = None
    assert [problem.split(":")[0] for problem in problems_of(raw)] == [
        "text_config.num_experts",
        "text_config.top_k_experts",
        "text_config.moe_intermediate_size",
    ]


def test_spellings_that_contradict_each_other_are_refused_layer_by_layer() -> None:
    raw = change(
        load("gemma-4-31B-it"), "text_config.per_layer_config", {"5": {"head_dim": 256}, "11": {"num_key_value_heads": 8}}
    )
    assert problems_of(raw) == (
        "layer 5: per_layer_config says head_dim 256, the global_* keys say 512",
        "layer 11: per_layer_config says num_key_value_heads 8, the global_* keys say 4",
    )


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
)
def test_a_missing_size_is_named(key: str) -> None:
    raw = load()
    for absent in (raw["text_config"].pop(key), None):  # left out, or null
        assert any(problem == f"text_config.{key}: missing; a Gemma 4 config needs this integer" for problem in problems_of(raw))
        raw["text_config"][key] = absent if absent is None else None


def test_zero_layers_are_refused() -> None:
    problems = problems_of(change(load(), "text_config.num_hidden_layers", 0))
    assert "text_config.num_hidden_layers: expected an integer from 1 to 4096, found 0" in problems


@pytest.mark.parametrize("model_type", ["gemma2", "gemma4_vision", "llama", "", 4, ["gemma4"], None])
def test_another_family_is_refused_without_noise(model_type: Any) -> None:
    with pytest.raises(ConfigError, match="is not a Gemma 4 config") as caught:
        config.read({"model_type": model_type, "hidden_size": -1, "whatever": 1})
    (problem,) = caught.value.problems
    assert problem.startswith("model_type: ")
    assert "gemma4" in problem


def test_unknown_keys_pass_by_pattern_only() -> None:
    raw = change(change(load(), "text_config.x_scale", 1), "x_mode", "fast")
    assert [problem.split(":")[0] for problem in problems_of(raw)] == ["text_config.x_scale", "x_mode"]
    assert [problem.split(":")[0] for problem in problems_of(raw, ignore=("x_s*",))] == ["x_mode"]
    assert derive(config.read(raw, ignore=("y", "x_*"))) == derive(config.read(load()))
    spoilt = change(raw, "text_config.hidden_size", -1)  # a pattern passes over unknown keys, not over bad values
    assert [problem.split(":")[0] for problem in problems_of(spoilt, ignore=("*",))] == ["text_config.hidden_size"]


def test_bookkeeping_keys_never_matter() -> None:
    raw = load()
    for key in config.IGNORED:
        raw[key] = raw["text_config"][key] = {"any": ["thing"]}
    assert derive(config.read(raw)) == derive(config.read(load()))


@pytest.mark.parametrize("write", ["to_dict", "to_diff_dict"])
@pytest.mark.parametrize("kind", ["Gemma4TextConfig", "Gemma4Config", "Gemma4UnifiedTextConfig", "Gemma4UnifiedConfig"])
def test_every_key_that_transformers_writes_is_read(kind: str, write: str) -> None:
    oracle = getattr(transformers, kind)()
    text = getattr(oracle, "text_config", oracle)
    plan = derive(config.read(json.loads(json.dumps(getattr(oracle, write)()))))
    assert [layer.attn is Attn.GLOBAL for layer in plan.layers] == [kind == "full_attention" for kind in text.layer_types]
    for index, layer in enumerate(plan.layers):
        view = text.per_layer_config[index]
        assert (layer.head_dim, layer.kv_heads) == (view.head_dim, view.num_key_value_heads)


@pytest.mark.parametrize("write", ["to_dict", "to_diff_dict"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_saved_by_transformers_is_the_published_one(name: str, write: str) -> None:
    raw = load(name)
    kind = "".join(part.capitalize() for part in raw["model_type"].split("_")) + "Config"
    saved = json.loads(json.dumps(getattr(getattr(transformers, kind).from_dict(raw), write)()))
    assert "global_head_dim" not in saved["text_config"]  # it is the other spelling
    assert derive(config.read(saved)) == derive(config.read(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["full_attention", "vision", "", "5"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["5", "head_dim", "full_attention"]), inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = [
    *sorted(f"text_config.{key}" for key in load(MOE)["text_config"]),
    *(f"text_config.{key}" for key in ("per_layer_config", "sliding_window_pattern", "rope_theta", "rope_local_base_freq")),
    *load(),
]


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    st.sampled_from([E2B, MOE, "gemma-4-E2B-it-assistant"]), st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3)
)
def test_any_json_is_read_or_refused(name: str, changes: dict[str, Any]) -> None:
    raw = load(name)
    for path, value in sorted(changes.items(), reverse=True):  # text_config itself goes last
        raw = change(raw, path, value)
    with contextlib.suppress(ConfigError):
        assert derive(config.read(raw)).num_params() > 0
