"""LoRA adapters from their files: names, config keys, what is refused, and merging, against PEFT and a formula in float64.

Owns reading and merging; adapters chosen per request are `tests/parity/test_adapters.py`'s, except that both ways must give the
golden tokens.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import gemcutter
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.formats.lora import Adapter, open_adapter
from gemcutter.checkpoint.load.adapters import attach, fold
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.model.text import Decoder
from gemcutter.ops.reference import linear
from gemcutter.quant import Part, Weight, affine, dequantize
from gemcutter.quant.lora import Delta
from tests.adapters import ALPHA, CONFIG, PREFIX, Place, draw, module_of, places, tensors_of, write_adapter
from tests.parity.test_round_trip import saved
from tests.topologies import SIZES, build_oracle, mismatches, oracle, plan_of, prompt, run_alone
from tests.trained import golden, trained

TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"
CPU = torch.device("cpu")
E2B, A4B, B31 = (plan_of(SIZES[size]) for size in ("E2B", "26B-A4B", "31B"))
QUERY: Place = ("layers.0.attn.in", "q")
LAYER = f"{PREFIX}model.layers.0."


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Limit torch to one thread: the models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO_FOLDER)


def one(folder: Path, /, **config: Any) -> Path:
    """Write an adapter of one change."""
    return write_adapter(folder, tensors_of(draw(E2B, [QUERY])), **config)


def problems_of(folder: Path, plan: Any = E2B) -> tuple[str, ...]:
    """Return what is wrong with an adapter, which must be something."""
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, plan)
    return caught.value.problems


# ---- against the tools ----


@pytest.mark.parametrize("way", ["merged", "beside"])
def test_golden_tokens_logits_and_losses(way: str) -> None:
    wanted, prompts, base = golden("tiny-e-lora"), golden("prompts"), golden("tiny-e")
    path = str(trained("tiny-e-lora"))
    chosen: dict[str, Any] = {"adapter": path} if way == "merged" else {"adapters": {"tiny": path}}
    asked = {} if way == "merged" else {"adapter": "tiny"}
    model = gemcutter.load("demo", dtype="float32", max_batched_tokens=64, max_num_seqs=12, context=1024, **chosen)
    ids = [each["token_ids"] for each in wanted["prompts"]]
    found = model.generate(ids, max_tokens=48, ignore_eos=True, temperature=0, top_logits=10, **asked)
    for mine, theirs in zip(found, wanted["prompts"], strict=True):
        assert list(mine.tokens) == theirs["greedy_ids"], theirs["id"]
        tokens, values = zip(*mine.prompt.top_logits, strict=True)
        assert list(tokens) == theirs["top10_ids"]
        assert list(values) == pytest.approx(theirs["top10_logits"], rel=1e-4)
    assert any(
        mine["greedy_ids"] != theirs["greedy_ids"] for mine, theirs in zip(wanted["prompts"], base["prompts"], strict=True)
    )
    (whole,) = model.generate([prompts["passage_600"]["token_ids"]], max_tokens=0, prompt_logprobs=0, **asked)
    mean = -math.fsum(entry.logprob for entry in whole.prompt.logprobs) / len(whole.prompt.logprobs)
    assert mean == pytest.approx(wanted["passage_600"]["nll_mean"], rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2}}], ids=str
)
@pytest.mark.parametrize("size", ["E2B", "26B-A4B", "31B"])
def test_peft_writes_what_is_read(size: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every linear module is adapted, keys that double as values and the router among them, and the stacked experts."""
    peft = pytest.importorskip("peft")
    model = build_oracle(SIZES[size], seed=7)
    base = saved(copy.deepcopy(model), tmp_path / "base")
    experts = ["experts.gate_up_proj", "experts.down_proj"] if size == "26B-A4B" else None
    rank_pattern = {"down_proj": 2, "layers.0.self_attn.o_proj": 5}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r".*layers\.\d+\..*(proj|gate|projection)$",
        target_parameters=experts,
        rank_pattern=rank_pattern,
        **options,
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(base)
    adapter = open_adapter(tmp_path / "adapter", checkpoint.plan)
    expected = {each for each in places(checkpoint.plan) if each[0] != "ple.in"}
    stacks = {
        (f"layers.{layer.index}.moe.{name}", None) for layer in checkpoint.plan.layers if layer.moe for name in ("in", "out")
    }
    assert {(each.name, each.part) for each in adapter.factors} == expected | stacks
    wanted = oracle(wrapped.base_model.model.eval(), prompt(24))
    params = load_params(checkpoint, torch.float32, CPU)
    merged, _ = fold(params, adapter, checkpoint, torch.float32, CPU)
    assert not mismatches(run_alone(Decoder(checkpoint.plan, merged), prompt(24), chunk=9), wanted)
    assert mismatches(run_alone(Decoder(checkpoint.plan, params), prompt(24), chunk=9), wanted, 0.01)


# ---- names ----


@pytest.mark.parametrize("prefix", [PREFIX, "base_model.model.model.language_model.", "model.language_model.", ""])
@pytest.mark.parametrize("ending", ["weight", "default.weight", "mine.weight"])
@pytest.mark.parametrize("inner", ["", ".linear"])
def test_every_wrapper_of_a_name_is_taken_off(prefix: str, ending: str, inner: str, tmp_path: Path) -> None:
    plain = tensors_of(draw(E2B, places(E2B)), prefix="")
    renamed = {}
    for name, tensor in plain.items():
        bare = name.removeprefix("model.") if "language_model" in prefix else name
        module, _, half = bare.removesuffix(".weight").rpartition(".")
        renamed[f"{prefix}{module}{inner}.{half}.{ending}"] = tensor
    adapter = open_adapter(write_adapter(tmp_path, renamed), E2B)
    assert [(each.name, each.part) for each in adapter.factors] == [
        (each.name, each.part) for each in open_adapter(write_adapter(tmp_path / "plain", plain), E2B).factors
    ]
    assert {(each.name, each.part) for each in adapter.factors} == set(places(E2B))
    assert not adapter.notes()


def test_the_file_may_be_named_in_place_of_its_folder(tmp_path: Path) -> None:
    folder = one(tmp_path)
    (change,) = open_adapter(folder / "adapter_model.safetensors", E2B).factors
    assert (change.label, change.scale) == ("layers.0.attn.in[q]", ALPHA / 3)


def test_towers_are_left_aside(tmp_path: Path) -> None:
    towers = {
        f"base_model.model.model.{tower}.layers.9.self_attn.{module}.lora_{half}.weight": torch.ones(2, 2)
        for tower in ("vision_tower.encoder", "audio_tower")
        for module in ("k_proj.linear", "v_proj")
        for half in "AB"
    }
    adapter = open_adapter(write_adapter(tmp_path, towers | tensors_of(draw(E2B, [QUERY]))), E2B)
    assert len(adapter.factors) == 1
    name = tmp_path.name
    assert adapter.notes() == [
        f"adapter {name}: 2 changes of the audio tower not loaded",
        f"adapter {name}: 2 changes of the vision tower not loaded",
    ]
    with pytest.raises(CheckpointError, match=r"changes nothing.*2 changes of the audio tower, 2 changes of the vision tower"):
        open_adapter(write_adapter(tmp_path / "only", towers), E2B)


def test_unread_keys_and_values_have_no_effect(tmp_path: Path) -> None:
    readers = [layer.index for layer in E2B.layers if not layer.writes]
    idle = {
        f"{PREFIX}model.layers.{index}.self_attn.{part}_proj.lora_{half}.weight": torch.ones(3, 48 if half == "A" else 3)
        for index in readers
        for part in "kv"
        for half in "AB"
    }
    both = open_adapter(write_adapter(tmp_path / "both", idle | tensors_of(draw(E2B, [QUERY]))), E2B)
    assert len(both.factors) == 1
    assert both.notes() == [
        f"adapter both: {2 * len(readers)} changes of keys and values have no effect, "
        f"because {len(readers)} layers do not use theirs"
    ]
    with pytest.raises(CheckpointError, match=f"changes nothing in the decoder; it holds {2 * len(readers)} changes of keys"):
        open_adapter(write_adapter(tmp_path / "idle", idle), E2B)


def test_values_where_the_key_is_the_value_have_no_effect(tmp_path: Path) -> None:
    (index,) = [layer.index for layer in A4B.layers if layer.proj.value == "qk"]
    value = {f"{PREFIX}model.layers.{index}.self_attn.v_proj.lora_{half}.weight": torch.ones(3, 3) for half in "AB"}
    key = tensors_of(draw(A4B, [(f"layers.{index}.attn.in", "k")]))
    adapter = open_adapter(write_adapter(tmp_path, value | key), A4B)
    assert [each.label for each in adapter.factors] == [f"layers.{index}.attn.in[k]"]
    assert len(adapter.idle) == 1


# ---- the config ----


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / 3),
        ({"lora_alpha": 1.5}, 0.5),
        ({"lora_alpha": -3}, -1.0),
        ({"use_rslora": True}, ALPHA / math.sqrt(3)),
        ({"alpha_pattern": {"q_proj": 12}}, 4.0),
        ({"alpha_pattern": {"self_attn": 12, "o_proj": 12, "_proj": 12, "proj": 12}}, ALPHA / 3),
        ({"alpha_pattern": {"0.self_attn.q_proj": 12, "q_proj": 24}}, 4.0),
        ({"alpha_pattern": {"q_proj": 24, "0.self_attn.q_proj": 12}}, 8.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj$": 12}}, 4.0),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 12}}, ALPHA / 3),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 12}}, 4.0),
        ({"r": 8, "rank_pattern": {"q_proj": 3}}, ALPHA / 3),
        ({"r": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}, "use_rslora": True}, 12 / math.sqrt(3)),
    ],
    ids=str,
)
def test_the_scale_follows_rank_and_alpha(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    (change,) = open_adapter(one(tmp_path, **config), E2B).factors
    assert change.scale == pytest.approx(scale, rel=1e-12)
    assert change.rank == 3


REFUSED: dict[str, Any] = {
    "peft_type": "LOHA",
    "bias": "all",
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa_niter_4",
    "use_rslora": "yes",
    "r": 0,
    "lora_alpha": "16",
    "rank_pattern": {"(a|a)*b": 4},
    "alpha_pattern": {"q_proj": True},
    "trainable_token_indices": [5],
    "alora_invocation_tokens": [1, 2],
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "fan_in_fan_out": True,
    "use_bdlora": {"nblocks": 2},
    "something_new": 0.5,
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_change_the_maths_are_refused(key: str, tmp_path: Path) -> None:
    (problem,) = problems_of(one(tmp_path, **{key: REFUSED[key]}))
    assert problem.startswith(f"config     {key}: ")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**4000, None, [1], True], ids=lambda value: str(value)[:8])
def test_an_alpha_is_a_number(alpha: Any, tmp_path: Path) -> None:
    (problem,) = problems_of(one(tmp_path, lora_alpha=alpha))
    assert "lora_alpha: expected a number" in problem
    assert len(problem) < 300


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "something_new"])
def test_unset_keys_are_passed_over_and_set_ones_can_be(key: str, tmp_path: Path) -> None:
    assert open_adapter(one(tmp_path / "unset", **{key: None}), E2B).factors
    assert open_adapter(one(tmp_path / "set", **{key: REFUSED[key]}), E2B, ignore=[key]).factors


# ---- what does not fit ----


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    good = tensors_of(draw(E2B, [(f"layers.{index}.attn.out", None) for index in range(4)]))
    key = f"{LAYER}self_attn."
    changed = {
        f"{PREFIX}model.layers.1.self_attn.o_proj.lora_A.weight": torch.ones(3, 7),
        f"{PREFIX}model.layers.2.self_attn.o_proj.lora_B.weight": torch.ones(48, 2),
        f"{PREFIX}model.layers.3.self_attn.o_proj.lora_A.weight": torch.ones(3, 64).to(torch.int32),
        f"{key}q_proj.lora_A.weight": torch.ones(3, 48),
        f"{key}k_proj.lora_B.weight": torch.ones(8, 3),
        f"{key}x_proj.lora_A.weight": torch.ones(3, 48),
        f"{key}x_proj.lora_B.weight": torch.ones(8, 3),
        f"{PREFIX}model.layers.99.mlp.up_proj.lora_A.weight": torch.ones(3, 48),
        f"{PREFIX}model.layers.99.mlp.up_proj.lora_B.weight": torch.ones(32, 3),
        f"{PREFIX}model.norm.lora_A.weight": torch.ones(3, 48),
        f"{PREFIX}model.norm.lora_B.weight": torch.ones(48, 3),
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(3, 48),
        f"{PREFIX}lm_head.lora_B.weight": torch.ones(60, 3),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(3, 60),
        f"{PREFIX}model.embed_tokens.weight": torch.ones(60, 48),
        f"{key}o_proj.lora_magnitude_vector": torch.ones(48),
        f"{PREFIX}model.language_model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(3, 64),
        f"{PREFIX}model.language_model.layers.0.self_attn.o_proj.lora_B.weight": torch.ones(48, 3),
        f"{key}o_proj.lora_A.default.weight": torch.ones(3, 64),
    }
    found = problems_of(write_adapter(tmp_path, good | changed, use_dora=True))
    kinds = [problem.split()[0] for problem in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "config": 1,
        "dtype": 1,
        "duplicate": 2,
        "missing": 2,
        "shape": 2,
        "unknown": 7,
    }
    text = "\n".join(found)
    for word in ("embedding table", "the model has no layers.99.mlp.in", "norm is no matrix", "adapted embeddings", "DoRA"):
        assert word in text
    assert "(3, 64) expected for rank 3, adapter_model.safetensors:" in text


def test_a_rank_that_the_config_does_not_give_is_refused(tmp_path: Path) -> None:
    down, up = problems_of(one(tmp_path, r=4))
    assert "(4, 48) expected for rank 4" in down
    assert "(64, 4) expected for rank 4" in up


def test_tensors_can_be_passed_over(tmp_path: Path) -> None:
    strange = {f"{PREFIX}model.embed_tokens.weight": torch.ones(60, 48)}
    folder = write_adapter(tmp_path, strange | tensors_of(draw(E2B, [QUERY])))
    assert problems_of(folder)
    assert len(open_adapter(folder, E2B, ignore=["*embed_tokens*"]).factors) == 1


def test_folders_that_hold_no_adapter_say_what_they_hold(tmp_path: Path) -> None:
    for name, word in {"adapter_model.bin": "pickle", "adapters.safetensors": "mlx-lm", "other": "is a folder with"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=word):
            open_adapter(tmp_path / name, E2B)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        open_adapter(tmp_path, E2B)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_adapter(write_adapter(tmp_path, {}), E2B)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_adapter(tmp_path / "absent", E2B)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an adapter: load the model that it is for"):
        open_checkpoint(one(tmp_path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted({*CONFIG, *REFUSED})) | st.text(max_size=6), VALUES, max_size=6))
def test_any_config_is_read_or_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    try:
        folder = one(tmp_path, **config)
    except UnicodeEncodeError:  # json spells lone surrogates, files can't
        return
    try:
        assert all(math.isfinite(each.scale) for each in open_adapter(folder, E2B).factors)
    except CheckpointError:
        return


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.builds(
            "{}{}{}".format,
            st.sampled_from([LAYER, f"{PREFIX}model.", ""]),
            st.sampled_from(
                ["self_attn.q_proj", "experts", "experts.base_layer", "router.proj", "norm", "", "mlp.up_proj.linear"]
            ),
            st.sampled_from([".lora_A.weight", ".lora_B.weight", ".lora_A.x.weight", ".lora_B", ".lora_embedding_A"]),
        ),
        st.lists(st.integers(0, 4), max_size=4),
        max_size=6,
    )
)
def test_any_tensors_are_read_or_refused(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    folder = write_adapter(tmp_path, {name: torch.zeros(shape) for name, shape in shapes.items()})
    for plan in (E2B, A4B):
        with pytest.raises(CheckpointError):
            open_adapter(folder, plan)


def test_headers_alone_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyTensor, "raw", lambda self: pytest.fail(f"{self} was read"))
    assert open_adapter(one(tmp_path), E2B).factors


def test_thousands_of_patterns_cost_no_time(tmp_path: Path) -> None:
    tensors = tensors_of(draw(E2B, places(E2B)))
    patterns = {f"layers.{index}.q_proj": 1 for index in range(50_000)}
    adapter = open_adapter(write_adapter(tmp_path, tensors, alpha_pattern=patterns), E2B)
    assert {each.scale for each in adapter.factors} == {ALPHA / 3}


# ---- merging ----


def merge(checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Load a checkpoint's parameters and merge an adapter into them; give both."""
    params = load_params(checkpoint, dtype, CPU)
    merged, note = fold(params, adapter, checkpoint, dtype, CPU)
    return params, merged, note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_changes_is_copied_and_rounded_once(dtype: torch.dtype, demo: Checkpoint, tmp_path: Path) -> None:
    wanted: list[Place] = [
        QUERY,
        ("layers.0.attn.in", "v"),
        ("layers.3.mlp.out", None),
        ("ple.in", None),
        ("layers.9.mlp.in", "up"),
    ]
    changes = draw(demo.plan, wanted)
    adapter = open_adapter(write_adapter(tmp_path, tensors_of(changes)), demo.plan)
    params, merged, note = merge(demo, adapter, dtype)
    stored = load_file(DEMO_FOLDER / "model.safetensors")
    num_bytes = 0
    for name, param in params.items():
        if isinstance(param, Tensor):
            assert merged[name] is param
            continue
        for part, before, after in zip(param.names or (None,), param.parts, merged[name].parts, strict=True):
            if (name, part) not in changes:
                assert after is before
                continue
            down, up = changes[name, part]
            exact = stored[f"{module_of((name, part))}.weight"].double() + ALPHA / 3 * (up.double() @ down.double())
            assert after.dtype == dtype
            slack = 1e-6 * exact.abs().max()
            assert bool(((after.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all())
            num_bytes += after.nbytes
    assert f"{len(wanted)} changes merged" in note
    assert f"{num_bytes / 1e6:.1f} MB in memory" in note


def test_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    """PEFT stacks the rows of A by expert and interleaves the columns of B; the second parameter of a module is nested."""
    checkpoint = open_checkpoint(TINY_A)
    plan = checkpoint.plan
    moe, hidden = plan.layers[0].moe, plan.hidden
    assert moe is not None
    generator = torch.Generator().manual_seed(0)
    shapes = {"experts.base_layer": (2 * moe.width, hidden), "experts": (hidden, moe.width)}
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{LAYER}{module}.lora_A.weight"] = torch.randn(3 * moe.experts, columns, generator=generator)
        tensors[f"{LAYER}{module}.lora_B.weight"] = torch.randn(rows, 3 * moe.experts, generator=generator)
    adapter = open_adapter(write_adapter(tmp_path, tensors, alpha_pattern={"experts.down_proj": 3}), plan)
    params, merged, _ = merge(checkpoint, adapter, torch.float32)
    for module, name, scale in (("experts.base_layer", "layers.0.moe.in", 2.0), ("experts", "layers.0.moe.out", 1.0)):
        down = tensors[f"{LAYER}{module}.lora_A.weight"].double()
        up = tensors[f"{LAYER}{module}.lora_B.weight"].double()
        before, after = (torch.cat([dequantize(part) for part in each[name].parts], 1).double() for each in (params, merged))
        for index in range(moe.experts):
            change = scale * up[:, index :: moe.experts] @ down[3 * index : 3 * index + 3]
            torch.testing.assert_close(after[index], before[index] + change, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="can only be merged") as caught:
        attach(params, adapter, "experts", CPU)
    assert len(caught.value.problems) == 2


def test_packed_weights_are_merged_dense_and_adapted_packed(demo: Checkpoint, tmp_path: Path) -> None:
    """Beside an adapter a packed weight stays packed; the two ways agree, and the others stay packed in either."""
    changes = draw(demo.plan, [("layers.0.mlp.in", "gate"), ("layers.7.mlp.out", None), ("layers.2.attn.in", "k")])
    adapter = open_adapter(write_adapter(tmp_path, tensors_of(changes)), demo.plan)
    params = load_params(demo, torch.float32, CPU)
    for name, param in params.items():
        if isinstance(param, Weight) and name.startswith(("layers.0.", "layers.2.", "layers.7.")):
            packed: tuple[Part, ...] = tuple(affine.quantize(dequantize(part), 8, 32) for part in param.parts)
            params[name] = Weight(packed, param.names)
    merged, _ = fold(params, adapter, demo, torch.float32, CPU)
    carried = attach(params, adapter, "tiny", CPU)
    gate, up = merged["layers.0.mlp.in"].parts  # type: ignore[union-attr]
    assert isinstance(gate, Tensor)
    assert up is params["layers.0.mlp.in"].parts[1]  # type: ignore[union-attr]
    assert carried["layers.0.mlp.in"].parts == params["layers.0.mlp.in"].parts  # type: ignore[union-attr]
    runs = [Decoder(demo.plan, each) for each in (merged, carried, params)]
    folded, beside, base = (gemcutter.Engine(decoder, 256, max_batched_tokens=16) for decoder in runs)
    found = [_logits(engine, adapter) for engine, adapter in ((folded, None), (beside, "tiny"), (base, None), (beside, None))]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], found[3])
    assert float((found[1] - found[2]).abs().max()) > 0.1


def _logits(engine: gemcutter.Engine, adapter: str | None) -> Tensor:
    """Return all logits at the end of a prompt."""
    size = engine.decoder.plan.vocab
    engine.submit(gemcutter.Request(tuple(range(20, 60)), max_tokens=0, adapter=adapter, top_logits=size))
    events = []
    while engine.has_work:
        events += engine.step()
    assert events[0].prompt is not None
    return torch.tensor([value for _, value in sorted(events[0].prompt.top_logits)])


def test_an_untied_head_is_merged_only(tmp_path: Path) -> None:
    model = build_oracle(SIZES["31B"] | {"tie_word_embeddings": False})
    checkpoint = open_checkpoint(saved(model, tmp_path / "base"))
    changes = draw(checkpoint.plan, [("head", None)])
    adapter = open_adapter(write_adapter(tmp_path / "adapter", tensors_of(changes)), checkpoint.plan)
    params, merged, _ = merge(checkpoint, adapter, torch.float32)
    down, up = changes["head", None]
    torch.testing.assert_close(merged["head"].parts[0], params["head"].parts[0] + ALPHA / 3 * up @ down)
    with pytest.raises(CheckpointError, match="can only be merged"):
        attach(params, adapter, "head", CPU)


@pytest.mark.parametrize("cut", ["part", "slice", "span", "whole"])
def test_deltas_are_cut_with_their_weight(cut: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    deltas = (Delta("a", 4, randn(2, 12), randn(6, 2)), Delta("b", 0, randn(3, 12), randn(18, 3)))
    weight = Weight((randn(4, 12), randn(6, 12), randn(8, 12)), ("q", "k", "v"), deltas)
    full = dense(weight)
    found, wanted = {
        "part": (weight.part("v", "k"), torch.cat([full[10:], full[4:10]])),
        "slice": (weight.slice(6, 15), full[6:15]),
        "span": (weight.span(4, 8), full[:, 4:8]),
        "whole": (weight.part("q", "k", "v").slice(0, 18), full),
    }[cut]
    torch.testing.assert_close(dense(found), wanted)


def dense(weight: Weight) -> Tensor:
    """Add everything that a weight carries."""
    out = linear(torch.eye(weight.columns), Weight(weight.parts)).t().clone()
    for delta in weight.deltas:
        out[delta.start : delta.start + len(delta.up)] += delta.up @ delta.down
    return out


# ---- through the API and the command line ----


def test_the_api_takes_one_for_good_and_several_by_name(demo: Checkpoint, tmp_path: Path) -> None:
    wide, narrow = (
        str(write_adapter(tmp_path / name, tensors_of(draw(demo.plan, wanted, seed=index))))
        for index, (name, wanted) in enumerate({"wide": places(demo.plan), "narrow": [QUERY]}.items())
    )
    model = gemcutter.load("demo", dtype="float32", context=512, adapters={"wide": wide, "narrow": narrow})
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    asked = "In the beginning"
    streams = [model.stream(asked, adapter=name, **options) for name in ("wide", None, "narrow")]
    together = [stream.finish().tokens for stream in streams]
    for path, tokens in zip((wide, None, narrow), together, strict=True):
        alone = gemcutter.load("demo", dtype="float32", context=512, adapter=path)
        assert alone.generate(asked, **options).tokens == tokens
        assert any("merged" in note for note in alone.notes) == (path is not None)
    assert together[0] != together[1]
    with pytest.raises(RequestError, match=r"request\.adapter: 'wider' is not loaded; loaded are: narrow, wide"):
        model.generate(asked, adapter="wider")
    with pytest.raises(RequestError, match="adapters: expected paths by name"):
        gemcutter.load("demo", adapters=[wide])  # type: ignore[arg-type]


def test_the_command_line_merges_an_adapter(demo: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_adapter(tmp_path / "mine", tensors_of(draw(demo.plan, places(demo.plan)))))
    (tmp_path / "text").write_text("A lantern is a lamp.")
    outputs = {}
    for words in (["run", "demo", "What is it?", "-n", "8"], ["score", "demo", str(tmp_path / "text"), "--json"]):
        for extra in ([], ["--adapter", folder]):
            assert main([*words, "--dtype", "float32", *extra]) == 0
            outputs[words[0], bool(extra)], notes = capsys.readouterr()
            assert ("adapter mine" in notes) == bool(extra)
    assert outputs["run", False] != outputs["run", True]
    losses = [json.loads(outputs["score", each])["nll_mean"] for each in (False, True)]
    assert abs(losses[0] - losses[1]) > 0.01
    assert main(["run", "demo", "Hi", "--adapter", str(tmp_path)]) == 1
    assert "holds no adapter_model.safetensors" in capsys.readouterr().err
