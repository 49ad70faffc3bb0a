"""Checkpoints as people really have them: files that disagree, leftovers, damaged values. Each loads, or says why not.

Owns one small case for each situation that was reported from other engines or found by attack. `mutations.py` makes the sound
checkpoint that every case changes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gemcutter
from gemcutter.checkpoint.doctor.doctor import examine
from gemcutter.cli.doctor import read_text
from gemcutter.errors import CheckpointError, ConfigError, NumericError, RequestError
from tests.formats.mutations import RAW, write_sound

EMBED, PLE, HEAD = "model.embed_tokens.weight", "model.embed_tokens_per_layer.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sound("hf", tmp_path / "model")


def load(folder: Path | str, **options: Any) -> gemcutter.Model:
    return gemcutter.load(str(folder), context=64, **options)


def change(folder: Path, edit: Callable[[Tensors], object], **config: Any) -> None:
    """Edit the tensors of a checkpoint, and keys of its config."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", **config)


def edit_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def doctor(folder: Path, data: bool = False) -> dict[str, Any]:
    return examine(str(folder), read_text=read_text, data=data)


def says(report: dict[str, Any], words: str) -> bool:
    return any(words in text for text in (*report["remarks"], *(each["text"] for each in report["problems"])))


# ---- ids, tables and heads ----


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_ids_without_a_per_layer_row_get_the_padding_token_s(folder: Path, kernels: str) -> None:
    """The vocabulary was extended, the table of per-layer embeddings was not; as if its first row were there again."""
    more = 64
    change(folder, lambda held: held.update({EMBED: torch.cat([held[EMBED], held[EMBED][:more]])}), vocab_size=4096 + more)
    with load(folder, kernels=kernels, dtype="float32") as model:
        found = model.generate([[2, 4100, 7]], max_tokens=4, top_logits=3, ignore_eos=True)[0]
        assert any("4,096 rows, the vocabulary 4,160" in note for note in model.notes)
    change(
        folder,
        lambda held: held.update({PLE: torch.cat([held[PLE], held[PLE][:1].expand(more, -1)])}),
        vocab_size_per_layer_input=4096 + more,
    )
    with load(folder, kernels=kernels, dtype="float32") as model:
        wanted = model.generate([[2, 4100, 7]], max_tokens=4, top_logits=3, ignore_eos=True)[0]
    assert (found.tokens, found.prompt.top_logits) == (wanted.tokens, wanted.prompt.top_logits)
    assert not says(doctor(folder), "per-layer embeddings has")


def test_an_id_without_a_piece_adds_no_text_and_ends_nothing(folder: Path) -> None:
    def pad(held: Tensors) -> None:
        held[EMBED] = torch.cat([held[EMBED], torch.zeros(64, 64, dtype=torch.bfloat16)])
        held[PLE] = torch.cat([held[PLE], held[PLE][:64]])

    change(folder, pad, vocab_size=4160, vocab_size_per_layer_input=4160)
    with load(folder) as model:
        always = model.generate([[2, 300]], max_tokens=5, ignore_eos=True, logit_bias={4105: 1e4})[0]
        assert (always.tokens, always.text) == ((4105,) * 5, "")
        assert model.generate([[2, 4105, 300]], max_tokens=1)[0].finish_reason in ("length", "stop")
        with pytest.raises(RequestError, match="outside the vocabulary of 4160"):
            model.generate([[2, 4160]], max_tokens=1)


def test_a_token_of_tokenizer_config_alone_gets_its_id(folder: Path) -> None:
    change(
        folder,
        lambda held: held.update({name: torch.cat([held[name], held[name][:1]]) for name in (EMBED, PLE)}),
        vocab_size=4097,
        vocab_size_per_layer_input=4097,
    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"4096": {"content": "<case>", "special": True, **flags}})
    with load(folder) as model:
        assert model.tokenizer.encode("a<case>b", bos=False)[1] == 4096
        assert model.tokenizer.encode("a<case>b" * 20_000, bos=False).count(4096) == 20_000  # the library's encoder, too
        assert any("<case>" in note for note in model.notes)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"17": {"content": "<bos>"}, "4096": {"content": "<pad>"}})
    assert says(doctor(folder), "disagree on 2 tokens")


def test_replies_end_on_the_tokenizer_s_eos_and_the_template_s_marker(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|think|>")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|tool>{% endfor %}")
    with load(folder) as model:
        think, end = model.tokenizer.id_of("<|think|>"), model.tokenizer.id_of("<|tool>")
        assert {think, end} <= model.defaults.stop_ids
        stopped = model.generate([[2, 300]], max_tokens=5, logit_bias={think: 1e4})[0]
    assert stopped.finish_reason == "stop"
    asked = {stop["id"]: stop["asked_by"] for stop in doctor(folder)["stops"]}
    assert asked[think] == ["tokenizer's eos_token"]
    assert asked[end] == ["chat template"]


# ---- what is stored decides ----


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors"])
def test_leftover_quantization_settings_are_passed_over(folder: Path, method: str) -> None:
    change(folder, lambda held: None, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with load(folder) as model:
        assert any("quantization_config was passed over" in note for note in model.notes)
    report = doctor(folder)
    assert report["status"] == "remarks"
    assert says(report, "quantization_config was passed over")


@pytest.mark.parametrize("spelling", ["float16", "torch.float16", "half"])
def test_float16_is_stored_and_bfloat16_computed(folder: Path, spelling: str) -> None:
    change(folder, lambda held: held.update({name: each.half() for name, each in held.items()}), dtype=spelling)
    with load(folder) as model:
        assert model.decoder.dtype == torch.bfloat16
        assert any("computed in bfloat16" in note for note in model.notes)
    with load(folder, dtype="float32") as model:
        assert not any("computed in" in note for note in model.notes)


def test_a_dtype_may_have_torch_s_prefix(folder: Path) -> None:
    change(folder, lambda held: None, dtype="torch.bfloat16")
    with load(folder) as model:
        assert not model.notes


def test_null_is_absent_in_every_setting_of_mlx(tmp_path: Path) -> None:
    folder = write_sound("mlx", tmp_path / "mlx")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization"]["model.layers.0.mlp.up_proj"] = {"bits": 4, "group_size": None, "mode": None}
    (folder / "config.json").write_text(json.dumps(raw))
    load(folder).close()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_trainer_s_prefix_is_taken_off(folder: Path, prefix: str) -> None:
    def carry(held: Tensors) -> None:
        for name in list(held):
            held[prefix + name] = held.pop(name)

    change(folder, carry)
    with load(folder) as model:
        assert any("begin with" in note for note in model.notes)


def test_a_missing_scalar_among_others_is_missing(folder: Path) -> None:
    change(folder, lambda held: held.pop("model.layers.1.layer_scalar"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.scale .*all or none"):
        load(folder)
    change(folder, lambda held: [held.pop(name) for name in list(held) if name.endswith("layer_scalar")])
    load(folder).close()


def test_the_doctor_knows_an_adapter(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.3.self_attn.q_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.zeros(4, 64), f"{stem}.lora_B.weight": torch.zeros(64, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "acme/tiny"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = doctor(tmp_path)
    assert (report["status"], report["format"], len(report["problems"])) == ("broken", "PEFT adapter", 1)  # as a model
    assert "a LoRA adapter for 'acme/tiny': rank 4, alpha 8, 1 matrices (q_proj) of 1 layers" in report["problems"][0]["text"]
    assert says(report, "its settings and names are read")
    edit_json(tmp_path / "adapter_config.json", use_dora=True)
    assert not says(doctor(tmp_path), "its settings and names are read")


def test_a_flood_of_problems_is_a_few_lines(folder: Path) -> None:
    change(folder, lambda held: held.update({f"x.{number}": torch.ones(1) for number in range(500)}))
    with pytest.raises(CheckpointError, match="500 problems") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) <= 12
    assert "and 490 more" in str(caught.value)
    assert len(caught.value.problems) == 500


# ---- which files ----


def test_a_wrong_width_is_named_once(folder: Path) -> None:
    change(folder, lambda held: None, hidden_size=128)
    with pytest.raises(CheckpointError, match=r"nearly all have 64 where config\.json's hidden_size is 128"):
        load(folder)


def test_an_adapter_beside_complete_shards_is_none_of_them(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    load(folder).close()
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_to_nothing_is_not_an_absent_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/nowhere")
    with pytest.raises((CheckpointError, ConfigError), match=name.replace(".", r"\.")):
        load(folder)
    assert doctor(folder)["status"] == "broken"


def test_named_templates_serve_tools_and_survive_conversion(folder: Path, tmp_path: Path) -> None:
    from gemcutter.checkpoint.convert.convert import convert

    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    talk = [{"role": "user", "content": "Hi"}]
    convert(folder, tmp_path / "model.gguf", "gguf", "Q8_0")
    convert(tmp_path / "model.gguf", tmp_path / "back", "hf", "bf16", texts=_texts)
    for place in (folder, tmp_path / "model.gguf", tmp_path / "back"):
        with load(place) as model:
            assert model.tokenizer.decode(model.encode(talk), special=False) == "plain"
            assert model.tokenizer.decode(model.encode(talk, tools=tools), special=False) == "look_up"
    assert (tmp_path / "back" / "additional_chat_templates" / "rag.jinja").read_text() == "rag"


def _texts(checkpoint: Any) -> dict[str, bytes]:
    from gemcutter.text.export import tokenizer_files
    from gemcutter.text_assets import read_tokenizer

    return tokenizer_files(read_tokenizer(checkpoint.source))


# ---- values ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 5}, {"logprobs": 2}])
def test_values_that_are_not_finite_are_an_error_that_names_them(folder: Path, bad: float, options: dict[str, Any]) -> None:
    change(folder, lambda held: held[DOWN].view(-1).__setitem__(5, bad))
    with (
        load(folder) as model,
        pytest.raises(NumericError, match=r"from layer 1 on; values of layers\.1\.mlp\.out are not") as caught,
    ):
        model.generate([[2, 5, 6]], max_tokens=4, **options)
    assert "doctor MODEL --data" in str(caught.value)
    with load(folder) as model, pytest.raises(NumericError):
        model.generate([[2, 5, 6]], max_tokens=0, prompt_logprobs=1)
    report = doctor(folder, data=True)
    assert (report["status"], report["problems"][0]["kind"]) == ("broken", "values")
    assert DOWN in report["problems"][0]["text"]


def test_other_requests_go_on_beside_one_that_meets_such_values(folder: Path) -> None:
    """A single row of the embeddings is bad: whoever has that id in the prompt ends, nobody else."""
    change(folder, lambda held: held.update({HEAD: held[EMBED].clone()}), tie_word_embeddings=False)
    change(folder, lambda held: held[EMBED][77].fill_(math.nan))
    with load(folder) as model:
        alone = model.generate([[2, 5, 6]], max_tokens=6, ignore_eos=True)[0].tokens
        good, bad = model.stream([2, 5, 6], max_tokens=6, ignore_eos=True), model.stream([2, 77], max_tokens=6)
        with pytest.raises(NumericError, match=r"from the token embeddings on; values of embed\.tokens"):
            bad.finish()
        assert good.finish().tokens == alone


def test_values_are_read_on_request(folder: Path) -> None:
    def spoil(held: Tensors) -> None:
        held[HEAD] = held[EMBED] + 1
        held["model.layers.0.layer_scalar"] = torch.tensor([1e5])
        held["model.layers.1.mlp.up_proj.weight"][3] = 0
        held["model.layers.0.mlp.up_proj.weight"][3, 4] = 3e5

    assert doctor(folder, data=True)["problems"] == []
    change(folder, spoil)
    report = doctor(folder, data=True)
    assert report["status"] == "remarks"
    for words in ("differs from the embeddings", "scaled by 1e+05", "rows of a single value in 1 tensor", "values beyond 10000"):
        assert says(report, words), words


# ---- what surrounds the weights, when it is hostile ----

CHILD = """
import resource, sys
import gemcutter
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 1500 * 2**20,) * 2)
try:
    model = gemcutter.load(sys.argv[1], context=64)
    model.encode("a" * 5000 + "x" * 200 + "!")
    print("accepted")
except gemcutter.GemcutterError as error:
    print("refused", str(error)[:300])
"""


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GROWING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4
HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a pattern without end": lambda raw: raw.update(pre_tokenizer=split("(a+)+$")),
    "a normalizer that grows": lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": GROWING}),
    "a map of 8 GB": lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/" * 16}),
    "a token that is an object": lambda raw: raw["added_tokens"][0].update(content={"a": 1}),
    "a negative id": lambda raw: raw["added_tokens"][0].update(id=-1),
    "random ids": lambda raw: raw["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_are_refused_before_any_library_meets_them(folder: Path, name: str) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    HOSTILE[name](raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("refused"), done.stdout
    assert "tokenizer.json is not a tokenizer of Gemma's kind" in done.stdout


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_without_end_is_refused_before_it_is_parsed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b'{"model_type":"gemma4_text","x":[' + b"[]," * 3_000_000 + b"[]]}")
    with pytest.raises((CheckpointError, ConfigError), match="commas and brackets, above 1,000,000"):
        load(folder)
    (folder / name).write_bytes(b" " * (17 << 20))
    with pytest.raises((CheckpointError, ConfigError), match="bytes, above"):
        load(folder)


def test_a_file_that_is_written_over_is_noticed_and_one_that_is_replaced_is_not(folder: Path) -> None:
    path = folder / "model.safetensors"
    with load(folder) as model:
        said = model.generate([[2, 5, 6]], max_tokens=3)[0].tokens
        content = path.read_bytes()
        path.rename(folder / "old")
        path.write_bytes(content[:-1000] + bytes(1000))
        assert model.generate([[2, 5, 6]], max_tokens=3)[0].tokens == said
        (folder / "old").rename(path)
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while .* load the model again"):
            model.generate([[2, 5, 6]], max_tokens=3)


def test_a_template_that_fails_is_a_note(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}")
    with load(folder) as model:
        assert any("fails on a greeting" in note for note in model.notes)
    assert says(doctor(folder), "fails on a greeting")


def test_the_sound_checkpoint_is_fine(folder: Path) -> None:
    assert RAW["vocab_size"] == 4096
    assert doctor(folder)["problems"] == []
    with load(folder) as model:
        assert not model.notes
