"""The strict loader's first half: what a checkpoint's headers hold against what the plan needs.

Owns hand-made checkpoints of every published naming, with all that they carry beyond the decoder, and each way in which one can
be wrong. Nothing here may touch a tensor's data: the `sealed` fixture sees to that. Read `test_load.py` for the second half.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gemcutter import config as configs
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, MappedFile, tensor_nbytes
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.write.synth import SIZES, shrink, spell_config
from gemcutter.checkpoint.write.write_safetensors import write_json, write_safetensors
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, Proj, derive

Raw = dict[str, Any]
Entries = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype and shape; the data is zeros

TEXT_ONLY, RELEASE = "model.", "model.language_model."
CONFIGS = sorted((Path(__file__).parents[1] / "goldens" / "configs").glob("*.json"))


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to read a tensor's data fail."""

    def fail(self: object, *_: object) -> NoReturn:
        raise AssertionError(f"{self} was read while matching")

    monkeypatch.setattr(LazyTensor, "torch", fail)
    monkeypatch.setattr(LazyTensor, "raw", fail)
    monkeypatch.setattr(MappedFile, "mapping", fail)


# ---- hand-made checkpoints ----


def config_of(like: str, **traits: Any) -> Raw:
    """Return the config of a size with all its traits and widths of a few numbers each."""
    size = shrink(SIZES[like])
    narrow = replace(size, hidden=8, mlp=6, head_dim=4, vocab=16, ple=2 if size.ple else 0, expert_width=3 if size.experts else 0)
    return spell_config(narrow) | traits


def assistant_config() -> Raw:
    """Return the config of a drafter: four layers that own no keys and values."""
    size = replace(shrink(SIZES["31B"]), hidden=8, mlp=6, layers=4, period=4, readers=4, global_kv_heads=None, vocab=16)
    text = spell_config(size) | {"use_bidirectional_attention": None}
    extra = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
    return {"model_type": "gemma4_assistant", "backbone_hidden_size": 12, "text_config": text} | extra


def plan_of(raw: Raw) -> ModelPlan:
    return derive(configs.read(raw))


def stored_parts(spec: ParamSpec) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """List the parts in which files store a parameter; a stack of experts is stored whole."""
    if not spec.parts or len(spec.shape) == 3:
        yield None, spec.shape
        return
    for part, rows in spec.parts:
        yield part, (rows, spec.shape[-1])


def entries_of(raw: Raw, prefix: str = TEXT_ONLY) -> Entries:
    """List exactly the tensors that a config's decoder needs, in the naming of `prefix`."""
    named = {
        hf.spell(spec.name, part): ("I64" if spec.integer else "BF16", shape)
        for spec in plan_of(raw).params()
        for part, shape in stored_parts(spec)
    }
    return {prefix + name.removeprefix(TEXT_ONLY) if name.startswith(TEXT_ONLY) else name: entry for name, entry in named.items()}


def write(folder: Path, raw: Raw, entries: Entries) -> Path:
    """Write a checkpoint of zeros."""
    write_json(folder / "config.json", raw)
    specs = [(name, dtype, shape) for name, (dtype, shape) in entries.items()]
    write_safetensors(folder / "model.safetensors", specs, (bytes(tensor_nbytes(*entry)) for entry in entries.values()))
    return folder


def problems_of(folder: Path, *ignore: str) -> tuple[str, ...]:
    """Open a checkpoint that must be refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, ignore)
    count = len(caught.value.problems)
    assert caught.value.summary == (
        f"{folder} does not match the plan ({count} problem{'s' if count > 1 else ''}, nothing was allocated)"
    )
    return caught.value.problems


def assert_complete(found: Checkpoint) -> None:
    """Check that every parameter has its pieces, in the order of its parts, each with the right name."""
    matched = found.matched
    assert list(matched.pieces) == [spec.name for spec in found.plan.params()]
    for spec in found.plan.params():
        pieces = matched.pieces[spec.name]
        assert [(piece.name, piece.part, piece.data.shape) for piece in pieces] == [
            (spec.name, part, shape) for part, shape in stored_parts(spec)
        ]


def redundant_names(found: Checkpoint) -> set[str]:
    return {piece.data.name for piece in found.matched.redundant}


# ---- what fits ----


@pytest.mark.parametrize("like", SIZES)
def test_what_the_plan_needs_is_all_that_is_needed(like: str, tmp_path: Path) -> None:
    raw = config_of(like)
    found = open_checkpoint(write(tmp_path, raw, entries_of(raw)))
    assert_complete(found)
    assert found.plan == plan_of(raw)
    assert found.format == hf.NAME
    assert not found.matched.notes(found.plan)
    assert [found.matched.redundant, found.matched.other_modules, found.matched.defaults, found.matched.ignored] == [
        [],
        {},
        [],
        [],
    ]


@pytest.mark.parametrize("prefix", [*hf.PREFIXES, ""])
@pytest.mark.parametrize("like", ["E2B", "26B-A4B"])
def test_every_prefix_is_understood(like: str, prefix: str, tmp_path: Path) -> None:
    raw = config_of(like)
    found = open_checkpoint(write(tmp_path, raw, entries_of(raw, prefix)) / "model.safetensors")  # a file will do as well
    assert_complete(found)
    assert not found.matched.notes(found.plan)


def test_names_of_the_releases() -> None:
    """Spelled out by hand: the names of published files, whatever `spell` believes."""
    published = {
        "model.language_model.embed_tokens.weight": ("embed.tokens", None),
        "model.language_model.embed_tokens_per_layer.weight": ("embed.ple", None),
        "model.language_model.per_layer_model_projection.weight": ("ple.in", None),
        "model.language_model.per_layer_projection_norm.weight": ("ple.norm", None),
        "model.language_model.norm.weight": ("norm", None),
        "lm_head.weight": ("head", None),
        "language_model.lm_head.weight": ("head", None),
        "model.language_model.layers.0.input_layernorm.weight": ("layers.0.attn.norm", None),
        "model.language_model.layers.14.self_attn.q_proj.weight": ("layers.14.attn.in", "q"),
        "language_model.model.layers.14.self_attn.k_proj.weight": ("layers.14.attn.in", "k"),
        "model.layers.14.self_attn.v_proj.weight": ("layers.14.attn.in", "v"),
        "model.layers.3.self_attn.k_norm.weight": ("layers.3.attn.k_norm", None),
        "model.layers.3.self_attn.o_proj.weight": ("layers.3.attn.out", None),
        "model.layers.3.post_attention_layernorm.weight": ("layers.3.attn.post_norm", None),
        "model.layers.3.pre_feedforward_layernorm.weight": ("layers.3.mlp.norm", None),
        "model.layers.3.post_feedforward_layernorm.weight": ("layers.3.mlp.post_norm", None),
        "model.layers.3.post_feedforward_layernorm_1.weight": ("layers.3.mlp.branch_norm", None),
        "model.layers.3.pre_feedforward_layernorm_2.weight": ("layers.3.moe.norm", None),
        "model.layers.3.post_feedforward_layernorm_2.weight": ("layers.3.moe.branch_norm", None),
        "model.layers.3.router.scale": ("layers.3.moe.router_scale", None),
        "model.layers.3.router.per_expert_scale": ("layers.3.moe.expert_scale", None),
        "model.layers.3.experts.gate_up_proj": ("layers.3.moe.in", None),
        "language_model.model.layers.3.moe.experts.down_proj": ("layers.3.moe.out", None),
        "model.layers.3.per_layer_input_gate.weight": ("layers.3.ple.gate", None),
        "model.layers.3.layer_scalar": ("layers.3.scale", None),
        "masked_embedding.token_ordering": ("draft.order", None),
        "model.vision_tower.encoder.layers.20.self_attn.k_proj.linear.weight": ("(vision tower)", None),
        "vision_embedder.pos_embedding": ("(vision tower)", None),
        "model.audio_tower.layers.3.self_attn.k_proj.linear.weight": ("(audio tower)", None),
        "model.layers.3.self_attn.v_norm.weight": (None, None),
        "model.layers.3.layer_scalar.weight": (None, None),
    }
    pieces = {name: hf.translate(lazy(name)) for name in published}
    assert {name: (piece.name, piece.part) for name, piece in pieces.items()} == published


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_spell_is_the_inverse_of_translate(path: Path) -> None:
    plan = derive(configs.read(json.loads(path.read_text())))
    canonical = [(spec.name, part) for spec in plan.params() for part, _ in stored_parts(spec)]
    spelled = [hf.spell(*name) for name in canonical]
    assert len(set(spelled)) == len(spelled) > 40
    pieces = [hf.translate(lazy(name)) for name in spelled]
    assert [(piece.name, piece.part) for piece in pieces] == canonical


def lazy(name: str) -> LazyTensor:
    return LazyTensor(name, "BF16", (1,), 2, 0, MappedFile(Path(__file__)))


# ---- what lies beside ----


def release_extras(plan: ModelPlan) -> tuple[Entries, Entries]:
    """List what a release holds beyond the decoder: keys and values of readers, and towers deeper than the decoder."""
    readers = [layer.index for layer in plan.layers if layer.proj is Proj.Q_ONLY]
    unused = ("k_proj", "v_proj", "k_norm")
    redundant: Entries = {
        f"{RELEASE}layers.{index}.self_attn.{name}.weight": ("BF16", (4, 8)) for index in readers for name in unused
    }
    towers: Entries = {
        f"model.{tower}layers.{index}.self_attn.{name}.{infix}weight": ("BF16", (4, 8))
        for tower in ("vision_tower.encoder.", "audio_tower.")
        for index in range(len(plan.layers) + 2)
        for name in ("q_proj", "k_proj", "v_proj", "k_norm")
        for infix in ("linear.", "")  # without the infix the tail is a decoder's name, letter for letter
    }
    for name in ("embed_vision", "embed_audio"):
        towers[f"model.{name}.embedding_projection.weight"] = ("BF16", (8, 4))
    towers["model.vision_tower.encoder.layers.0.mlp.gate_proj.input_max"] = ("BF16", ())
    return redundant, towers


def test_releases_hold_towers_and_tensors_of_readers(tmp_path: Path) -> None:
    raw = config_of("E2B")
    plan = plan_of(raw)
    assert plan.first_reader < len(plan.layers)
    redundant, towers = release_extras(plan)
    found = open_checkpoint(write(tmp_path, raw, towers | entries_of(raw, RELEASE) | redundant))
    assert_complete(found)
    assert redundant_names(found) == redundant.keys()
    beside = {kind: {piece.data.name for piece in pieces} for kind, pieces in found.matched.other_modules.items()}
    assert beside.keys() == {"vision tower", "audio tower"}
    assert beside["vision tower"] == {name for name in towers if "vision" in name}
    assert beside["audio tower"] == {name for name in towers if "audio" in name}
    size = sum(tensor_nbytes(*entry) for entry in redundant.values()) / 1e6
    assert set(found.matched.notes(plan)) == {
        f"{len(redundant)} tensors of 5 layers that do not use them skipped, as planned ({size:.1f} MB)",
        f"{len(beside['audio tower'])} tensors of the audio tower not loaded",
        f"{len(beside['vision tower'])} tensors of the vision tower not loaded",
    }
    assert len(found.matched.notes(plan)) == 3


def test_readers_may_keep_some_of_what_they_do_not_use(tmp_path: Path) -> None:
    raw = config_of("E4B")
    last = plan_of(raw).layers[-1].index
    redundant: Entries = {f"model.layers.{last}.self_attn.v_proj.weight": ("F32", (1, 1))}  # its shape is nobody's business
    found = open_checkpoint(write(tmp_path, raw, entries_of(raw) | redundant))
    assert_complete(found)
    assert redundant_names(found) == redundant.keys()


@pytest.mark.parametrize("like", ["12B", "26B-A4B", "31B"])
def test_a_value_projection_of_a_layer_without_values_is_redundant(like: str, tmp_path: Path) -> None:
    raw = config_of(like)
    layer = next(layer for layer in plan_of(raw).layers if layer.proj is Proj.QK_ONLY)
    entries = entries_of(raw)
    key = f"model.layers.{layer.index}.self_attn.k_proj.weight"
    value = key.replace("k_proj", "v_proj")
    found = open_checkpoint(write(tmp_path, raw, entries | {value: entries[key]}))
    assert_complete(found)
    assert redundant_names(found) == {value}
    assert [piece.part for piece in found.matched.pieces[f"layers.{layer.index}.attn.in"]] == ["q", "k"]


def test_keys_of_a_drafter_are_redundant(tmp_path: Path) -> None:
    raw = assistant_config()
    extra: Entries = {f"model.layers.0.self_attn.{name}.weight": ("BF16", (8,)) for name in ("k_proj", "v_proj", "k_norm")}
    found = open_checkpoint(write(tmp_path, raw, entries_of(raw) | extra))
    assert found.plan.is_drafter
    assert_complete(found)
    assert redundant_names(found) == extra.keys()


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight", "model.lm_head.weight"]
)
def test_a_tied_head_is_redundant_and_another_is_needed(name: str, tmp_path: Path) -> None:
    tied, untied = (config_of("E4B", tie_word_embeddings=flag) for flag in (True, False))
    entries = entries_of(tied) | {name: ("BF16", (16, 8))}
    found = open_checkpoint(write(tmp_path, tied, entries))
    assert redundant_names(found) == {name}
    (note,) = found.matched.notes(found.plan)
    assert "of a tied head skipped, as planned" in note
    write_json(tmp_path / "config.json", untied)
    found = open_checkpoint(tmp_path)
    assert not found.matched.redundant
    assert [piece.data.name for piece in found.matched.pieces["head"]] == [name]


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    entries = entries_of(config_of("31B"))
    problems = problems_of(write(tmp_path, config_of("31B", tie_word_embeddings=False), entries))
    assert problems == ("missing    head (16, 8): lm_head.weight is in no file; download them again",)


def test_an_absent_layer_scalar_means_one(tmp_path: Path) -> None:
    raw = config_of("E2B")
    entries = {name: entry for name, entry in entries_of(raw).items() if not name.endswith("layer_scalar")}
    matched = open_checkpoint(write(tmp_path, raw, entries)).matched
    assert {spec.name: spec.default for spec in matched.defaults} == {f"layers.{index}.scale": 1.0 for index in range(15)}
    assert all(matched.pieces[spec.name] == () for spec in matched.defaults)


def test_leftovers_of_other_engines_are_left_aside(tmp_path: Path) -> None:
    raw = config_of("E2B")
    leftovers: Entries = {
        f"model.language_model.{name}": ("F32", (1,))
        for name in (
            "rotary_emb.local.inv_freq",
            "layers.0.self_attn.rotary_emb.cos_cached",
            "layers.0.self_attn.k_cache_scale",
            "layers.0.self_attn.v_scale",
            "soft_embedding_norm.weight",
        )
    }
    found = open_checkpoint(write(tmp_path, raw, entries_of(raw, RELEASE) | leftovers))
    assert_complete(found)
    assert found.matched.notes(found.plan) == [f"{len(leftovers)} tensors of the leftovers of other engines not loaded"]


# ---- what does not fit ----


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    raw = config_of("E2B")
    entries = entries_of(raw)
    del entries["model.layers.3.self_attn.v_proj.weight"]
    del entries["model.layers.5.mlp.down_proj.weight"]
    entries["model.layers.0.self_attn.q_proj.weight"] = ("BF16", (31, 8))
    entries["model.layers.1.self_attn.q_norm.weight"] = ("BF16", (1, 4))
    entries["model.norm.weight"] = ("I32", (8,))
    entries["model.layers.2.mlp.up_proj.weight"] = ("U8", (6, 8))
    entries["model.language_model.layers.0.input_layernorm.weight"] = ("BF16", (8,))  # there twice, in two spellings
    entries["model.layers.0.self_attn.v_norm.weight"] = ("BF16", (4,))
    entries["model.layers.15.self_attn.k_proj.weight"] = ("BF16", (4, 8))  # one layer too many
    rest = "is in no file; download them again"
    wanted = {
        ("missing", f"layers.3.attn.in[v] (4, 8): model.layers.3.self_attn.v_proj.weight {rest}"),
        ("missing", f"layers.5.mlp.out (8, 6): model.layers.5.mlp.down_proj.weight {rest}"),
        ("shape", "layers.0.attn.in[q] (32, 8) expected, model.safetensors:model.layers.0.self_attn.q_proj.weight has (31, 8)"),
        ("shape", "layers.1.attn.q_norm (4,) expected, model.safetensors:model.layers.1.self_attn.q_norm.weight has (1, 4)"),
        ("dtype", "norm: BF16, F16, F32 expected, model.safetensors:model.norm.weight is I32"),
        ("dtype", "layers.2.mlp.in[up]: BF16, F16, F32 expected, model.safetensors:model.layers.2.mlp.up_proj.weight is U8"),
        (
            "duplicate",
            "layers.0.attn.norm: model.safetensors:model.layers.0.input_layernorm.weight and "
            "model.safetensors:model.language_model.layers.0.input_layernorm.weight",
        ),
        *(
            ("unknown", f"model.safetensors:{name}: not part of this model; --ignore '{name}' to skip it")
            for name in ("model.layers.0.self_attn.v_norm.weight", "model.layers.15.self_attn.k_proj.weight")
        ),
    }
    problems = problems_of(write(tmp_path, raw, entries))
    split = {(problem.split()[0], problem.split(maxsplit=1)[1]) for problem in problems}
    assert split == wanted
    assert len(problems) == len(wanted)


@pytest.mark.parametrize(
    ("like", "name", "label"),
    [
        ("E2B", "layers.4.self_attn.k_norm.weight", "layers.4.attn.k_norm (8,)"),
        ("E2B", "layers.4.self_attn.k_proj.weight", "layers.4.attn.in[k] (8, 8)"),
        ("E2B", "layers.14.self_attn.q_proj.weight", "layers.14.attn.in[q] (64, 8)"),
        ("31B", "layers.5.self_attn.k_proj.weight", "layers.5.attn.in[k] (32, 8)"),
        ("31B", "layers.4.self_attn.v_proj.weight", "layers.4.attn.in[v] (64, 8)"),
        ("26B-A4B", "layers.0.experts.down_proj", "layers.0.moe.out (16, 8, 3)"),
        ("26B-A4B", "layers.0.router.scale", "layers.0.moe.router_scale (8,)"),
        ("E4B", "embed_tokens_per_layer.weight", "embed.ple (16, 36)"),
    ],
)
def test_what_a_layer_needs_must_be_there(like: str, name: str, label: str, tmp_path: Path) -> None:
    raw = config_of(like)
    entries = entries_of(raw)
    del entries[TEXT_ONLY + name]
    (problem,) = problems_of(write(tmp_path, raw, entries))
    assert problem == f"missing    {label}: {TEXT_ONLY}{name} is in no file; download them again"


def test_experts_are_stacked_in_one_tensor(tmp_path: Path) -> None:
    raw = config_of("26B-A4B")
    entries = entries_of(raw)
    stack = "model.layers.0.experts.gate_up_proj"
    assert entries[stack] == ("BF16", (16, 6, 8))
    del entries[stack]
    problems = problems_of(write(tmp_path, raw, entries))
    rest = f": {stack} is in no file; download them again"
    assert problems == tuple(f"missing    layers.0.moe.in[{part}] (16, 3, 8){rest}" for part in ("gate", "up"))
    entries[stack] = ("BF16", (16, 8, 6))  # transposed
    (problem,) = problems_of(write(tmp_path, raw, entries))
    assert problem.startswith("shape      layers.0.moe.in (16, 6, 8) expected")


@pytest.mark.parametrize("wide", [True, False])
def test_a_mismatch_of_double_width_is_explained(wide: bool, tmp_path: Path) -> None:
    """The config and the file disagree about double-wide readers: every reader's matrix must say so."""
    entries = entries_of(config_of("E2B", use_double_wide_mlp=wide))
    problems = problems_of(write(tmp_path, config_of("E2B", use_double_wide_mlp=not wide), entries))
    assert len(problems) == 5 * 3
    for problem in problems:
        assert problem.startswith("shape ")
        assert problem.endswith(": half or twice the width that config.json gives this layer; are both of one model?")


def test_other_mismatches_get_no_such_hint(tmp_path: Path) -> None:
    raw = config_of("E2B")
    entries = entries_of(raw)
    entries["model.layers.0.mlp.gate_proj.weight"] = ("BF16", (7, 8))
    entries["model.layers.0.self_attn.o_proj.weight"] = ("BF16", (8, 64))
    problems = problems_of(write(tmp_path, raw, entries))
    assert len(problems) == 2
    assert not [problem for problem in problems if "twice" in problem]


def test_integers_are_wanted_where_the_plan_wants_them(tmp_path: Path) -> None:
    raw = assistant_config()
    entries = entries_of(raw)
    entries["masked_embedding.token_ordering"] = ("BF16", (16,))
    (problem,) = problems_of(write(tmp_path, raw, entries))
    assert problem == "dtype      draft.order: I64, I32 expected, model.safetensors:masked_embedding.token_ordering is BF16"


def test_ignored_tensors_are_passed_over(tmp_path: Path) -> None:
    raw = config_of("E2B")
    odd: Entries = {"model.layers.0.odd.weight": ("BF16", (4,)), "model.layers.7.odd.bias": ("U8", (4,)), "other": ("F64", ())}
    folder = write(tmp_path, raw, entries_of(raw) | odd)
    assert len(problems_of(folder)) == 3
    assert problems_of(folder, "*.odd.*") == (
        "unknown    model.safetensors:other: not part of this model; --ignore 'other' to skip it",
    )
    found = open_checkpoint(folder, ["*.odd.*", "other"])
    assert_complete(found)
    assert {piece.data.name for piece in found.matched.ignored} == odd.keys()


def test_what_is_needed_can_not_be_ignored_away(tmp_path: Path) -> None:
    raw = config_of("E2B")
    problems = problems_of(write(tmp_path, raw, entries_of(raw)), "*.layers.0.mlp.down*")
    (problem,) = problems
    assert problem.startswith("missing    layers.0.mlp.out (8, 6): model.layers.0.mlp.down_proj.weight is in no file")


# ---- the config ----


def test_unknown_config_keys_are_refused_or_ignored(tmp_path: Path) -> None:
    raw = config_of("E2B", odd_key=3)
    write(tmp_path, raw, entries_of(config_of("E2B")))
    with pytest.raises(ConfigError, match="odd_key: unknown key"):
        open_checkpoint(tmp_path)
    assert_complete(open_checkpoint(tmp_path, ["odd_*"]))


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX affine"),
    ],
)
def test_quantized_checkpoints_are_refused_before_their_tensors(block: Raw, kind: str, tmp_path: Path) -> None:
    raw = config_of("E2B")
    folder = write(tmp_path, raw | block, {"model.layers.0.self_attn.q_proj.weight": ("U8", (2, 2))})
    message = (
        rf"the weights are quantized in a way that no format here reads \({kind}\)\. Use the checkpoint that it was made from"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert len(caught.value.problems) == 1


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    raw = config_of("E2B")
    write(tmp_path, raw, entries_of(raw))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json beside the weights; copy it"):
        open_checkpoint(tmp_path)
