"""Checkpoints written by transformers' `save_pretrained`, opened by gemcutter: the same decoder, the same logits.

Owns the way through files: the config with its sizes per layer, one shard and many, float32 and bfloat16, tied and untied heads.
Parity of the maths itself is `test_sizes.py`'s; hostile and damaged files are the formats' tests'.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.model.text import Decoder
from tests.topologies import SIZES, TOLERANCE, Raw, build_oracle, mismatches, oracle, plan_of, prompt, run_alone

PROMPT = prompt(24)


def saved(model: PreTrainedModel, folder: Path, shard: str = "1GB") -> Path:
    """Write a model as transformers does."""
    model.config.output_hidden_states = False
    model.save_pretrained(folder, max_shard_size=shard)
    model.config.output_hidden_states = True
    return folder


def opened(folder: Path, dtype: torch.dtype) -> Decoder:
    """Open a checkpoint for `dtype`."""
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.matched.notes(checkpoint.plan), "transformers writes nothing that the plan does not need"
    return Decoder(checkpoint.plan, load_params(checkpoint, dtype, torch.device("cpu")), dtype)


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one shard", "many shards"])
@pytest.mark.parametrize("size", SIZES)
def test_saved_model_equals_the_oracle(size: str, shard: str, tmp_path: Path) -> None:
    model = build_oracle(SIZES[size], seed=7)
    folder = saved(model, tmp_path, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert "per_layer_config" in json.loads((folder / "config.json").read_text())
    decoder = opened(folder, torch.float32)
    assert decoder.plan == plan_of(SIZES[size])
    assert not mismatches(run_alone(decoder, PROMPT, chunk=9), oracle(model, PROMPT))


def test_global_layers_like_the_others_need_no_spelling(tmp_path: Path) -> None:
    raw: Raw = SIZES["E2B"] | {"global_head_dim": SIZES["E2B"]["head_dim"]}
    model = build_oracle(raw)
    folder = saved(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["per_layer_config"] == {}
    assert not mismatches(run_alone(opened(folder, torch.float32), PROMPT, chunk=9), oracle(model, PROMPT))


def test_untied_head_is_loaded(tmp_path: Path) -> None:
    model = build_oracle(SIZES["31B"] | {"tie_word_embeddings": False})
    decoder = opened(saved(model, tmp_path), torch.float32)
    assert not decoder.plan.tied_head
    assert not mismatches(run_alone(decoder, PROMPT, chunk=9), oracle(model, PROMPT))


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_bfloat16_weights_run_in_both_dtypes(size: str, tmp_path: Path) -> None:
    model = build_oracle(SIZES[size], seed=8)
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    folder = saved(copy.deepcopy(model).bfloat16(), tmp_path)
    wanted = oracle(model, PROMPT)
    exact = run_alone(opened(folder, torch.float32), PROMPT, chunk=9)
    assert not mismatches(exact, wanted, TOLERANCE)
    rounded = run_alone(opened(folder, torch.bfloat16), PROMPT, chunk=9)
    assert mismatches(rounded, wanted, TOLERANCE), "bfloat16 was asked for"
    assert not mismatches(rounded, wanted, 0.15)
