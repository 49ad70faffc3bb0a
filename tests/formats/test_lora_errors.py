"""An adapter that does not fit: the error says for which model it was made, briefly, and hints at nothing that would be wrong.

Owns what a reader sees first; which problems there are is `test_lora.py`'s.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.errors import CheckpointError
from tests.adapters import PREFIX, draw, places, tensors_of, write_adapter
from tests.topologies import SIZES, plan_of

E2B, A4B = plan_of(SIZES["E2B"]), plan_of(SIZES["26B-A4B"])


def test_an_adapter_of_another_model_says_whose_it_is(tmp_path: Path) -> None:
    everything = tensors_of(draw(E2B, places(E2B)))
    folder = write_adapter(tmp_path, everything, base_model_name_or_path="google/gemma-4-E2B-it")
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, A4B)
    first, *lines = str(caught.value).splitlines()
    deep, hidden = len(E2B.layers), E2B.hidden
    assert f"made for 'google/gemma-4-E2B-it' (base_model_name_or_path), with at least {deep} layers" in first
    assert f"a hidden size of {hidden}; this model has {len(A4B.layers)} layers and a hidden size of {A4B.hidden}" in first
    kinds = [line.split()[0] for line in lines]
    assert all(kinds.count(kind) <= 11 for kind in kinds)
    assert sum(line.strip().endswith("more") for line in lines) == sum(kinds.count(kind) == 11 for kind in set(kinds)) > 0
    assert not any("--ignore" in line for line in lines)  # skipping what belongs to another model would merge the rest
    with pytest.raises(CheckpointError, match="made for another model, which it does not name"):
        open_adapter(write_adapter(tmp_path / "nameless", everything), A4B)


def test_what_may_be_skipped_in_an_adapter_of_this_model_still_says_so(tmp_path: Path) -> None:
    strange = {f"{PREFIX}model.embed_tokens.weight": torch.ones(60, 48)}
    with pytest.raises(CheckpointError) as caught:
        open_adapter(write_adapter(tmp_path, strange | tensors_of(draw(E2B, [("layers.0.attn.in", "q")]))), E2B)
    (problem,) = caught.value.problems
    assert "--ignore '" in problem
