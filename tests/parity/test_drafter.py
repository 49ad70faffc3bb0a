"""Assistants of all sizes compute what transformers' do, and the trained pair saves as many steps as it should.

Owns the comparison of one draft after the other with `Gemma4AssistantForCausalLM` over the same keys and values. Prompts are
shorter than the window here, where transformers shows an assistant one key more or less than a decoder sees.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gemcutter
from gemcutter import native
from gemcutter.api import Model
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.speculate.assistant import AssistantProposer
from gemcutter.engine.speculate.draft_model import DraftModelProposer
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.step import build_step
from gemcutter.errors import CheckpointError, ConfigError, RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import make_decoder, open_drafter
from gemcutter.model.drafter import Drafter, DraftLogits, likeliest
from gemcutter.model.text import Decoder
from gemcutter.plan import ModelPlan
from tests.parity.test_rows import KERNELS, WIDE, decoder_of, filled
from tests.topologies import SIZES, plan_of, relative_error
from tests.trained import GOLDENS, golden, trained
from tests.unit.test_drafts import run, tokens

VOCAB = 64
DRAFTS = 4
EXACT = "reference" if native.missing() else "auto"  # kernels whose rows never depend on their neighbours


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def config_of(size: str, plan: ModelPlan, vocab: int = VOCAB) -> dict[str, Any]:
    """Return the published config of a size's assistant, with widths that are small and fit the target."""
    raw: dict[str, Any] = json.loads((GOLDENS / "configs" / f"gemma-4-{size}-it-assistant.json").read_text())
    raw |= {"backbone_hidden_size": plan.hidden, "num_centroids": 16, "centroid_intermediate_top_k": 3, "dtype": "float32"}
    text = raw["text_config"] | WIDE | {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "sliding_window": 512}
    raw["text_config"] = text | {"num_attention_heads": 16, "max_position_embeddings": 4096, "dtype": "float32"}
    raw["text_config"]["num_key_value_heads"] = SIZES[size]["num_key_value_heads"]
    if raw["text_config"]["num_global_key_value_heads"]:
        raw["text_config"]["num_global_key_value_heads"] = SIZES[size]["num_global_key_value_heads"]
    return raw


def assistant_of(size: str, target: Decoder, folder: Path) -> Any:
    """Write an assistant with random weights as transformers does; return transformers' own."""
    vocab = target.plan.vocab
    (folder / "config.json").write_text(json.dumps(config_of(size, target.plan, vocab)))
    torch.manual_seed(5)
    with torch.inference_mode(mode=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float().eval()
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                size_in = parameter.shape[-1] if parameter.ndim > 1 else 16
                parameter.copy_(torch.randn_like(parameter) * size_in**-0.5 + float(parameter.ndim == 1))
                parameter.requires_grad_(requires_grad=False)
            if model.masked_embedding is not None:
                model.masked_embedding.token_ordering.copy_(torch.randperm(vocab))
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_drafts_are_transformers(size: str, kernels: str, tmp_path: Path) -> None:
    plan = plan_of(SIZES[size] | WIDE | {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "sliding_window": 512})
    target = decoder_of(plan, kernels)
    model = assistant_of(size, target, tmp_path)
    options = LoadOptions(model="target", draft_model=str(tmp_path), dtype="float32", kernels=kernels)
    drafter = open_drafter(options, target, [])
    cache, sequence, table = filled(target)
    target.forward(build_step(target, [ScheduledChunk.of(sequence, table, 12)]), cache)
    table.commit(12)
    keys = {}
    for kind, layer in (
        ("sliding_attention", drafter.decoder.plan.layers[0]),
        ("full_attention", drafter.decoder.plan.layers[3]),
    ):
        found = cache.read(layer.kv_layer, table.kv_range(layer.group))
        keys[kind] = tuple(each.transpose(0, 1)[None].float() for each in found)
    step = drafter.start(AssistantProposer(drafter)._step([sequence]))
    state = torch.randn(1, plan.hidden, generator=torch.Generator().manual_seed(9))
    position = torch.tensor([[table.length]])
    tolerance = 2e-5 if kernels == "reference" else 1e-4
    for token in range(7, 7 + DRAFTS):
        ids = torch.tensor([token])
        rows = torch.cat((target.embed(ids).float(), state), dim=1)[None]
        wanted = model(inputs_embeds=rows, position_ids=position, shared_kv_states=keys)
        found, state = drafter.draft(ids, state, step, cache)
        assert relative_error(state, wanted.last_hidden_state[0]) < tolerance
        state = wanted.last_hidden_state[0]
        logits = wanted.logits[0]
        if found.ids_SC is None:
            assert relative_error(found.logits_SC, logits) < tolerance
            continue
        assert len(set(found.ids_SC[0].tolist())) == 3 * VOCAB // 16
        assert relative_error(found.logits_SC, logits.gather(1, found.ids_SC)) < tolerance
        rest = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, found.ids_SC[0], value=False)
        assert float(logits[0, rest].max()) < float(found.logits_SC.min())  # nothing else is drafted there either


PANELS = {"vocab_size": 512, "vocab_size_per_layer_input": 512}  # two panels of the head under each of 16 centroids


@pytest.mark.skipif(native.missing() is not None, reason="the native library is not built")
@pytest.mark.parametrize("quant", [None, "q4"])
@pytest.mark.parametrize("size", SIZES)
def test_bursts_of_one_call_are_those_op_by_op(size: str, quant: str | None, tmp_path: Path) -> None:
    """Tokens, probabilities, states and logits of a batch, over one draft and over several in a row."""
    target = decoder_of(plan_of(SIZES[size] | WIDE | PANELS), "auto")
    assistant_of(size, target, tmp_path)
    options = LoadOptions(model="target", draft_model=str(tmp_path), dtype="float32", quant=quant)
    drafter = open_drafter(options, target, [])
    assert isinstance(drafter, Drafter)
    assert drafter._fused is not None
    cache, first, _ = filled(target)
    second = SequenceState(1, first.request)
    second.table = first.table
    step = drafter.start(AssistantProposer(drafter)._step([first, second]))
    ids = torch.tensor([7, 300])
    states = torch.randn(2, target.plan.hidden, generator=torch.Generator().manual_seed(9))
    before = states.clone()
    burst, single = drafter.draft_likeliest(ids, states, step, cache, 5), drafter.draft(ids, states, step, cache)
    assert torch.equal(states, before)
    drafter._fused = None
    slow, alone = drafter.draft_likeliest(ids, states, step, cache, 5), drafter.draft(ids, states, step, cache)
    assert torch.equal(burst.tokens_KS, slow.tokens_KS)
    assert len({*burst.tokens_KS.flatten().tolist()}) > 2
    assert relative_error(burst.chances_KS, slow.chances_KS) < 1e-4
    assert relative_error(burst.states_ST, slow.states_ST) < 1e-4
    assert relative_error(single[1], alone[1]) < 1e-4
    mine, other = single[0].in_order(), alone[0].in_order()
    assert relative_error(mine.logits_SC, other.logits_SC) < 1e-4
    assert (mine.ids_SC is None) == (other.ids_SC is None) == (size not in ("E2B", "E4B"))
    if mine.ids_SC is not None and other.ids_SC is not None:
        assert torch.equal(mine.ids_SC, other.ids_SC)
        assert mine.ids_SC.shape == (2, 3 * 32)


def test_the_lowest_of_equal_tokens_is_the_likeliest() -> None:
    logits, nan = torch.tensor([[1.0, 3.0, 3.0, 2.0], [4.0, 0.0, 0.0, 4.0]]), torch.full((1, 3), torch.nan)
    ids = torch.tensor([[5, 9, 2, 1], [8, 7, 6, 3]])
    assert likeliest(DraftLogits(logits, ids))[0].tolist() == [2, 3]
    assert likeliest(DraftLogits(logits))[0].tolist() == [1, 0]
    torch.testing.assert_close(likeliest(DraftLogits(logits, ids))[1], logits.softmax(1).amax(1))
    assert likeliest(DraftLogits(nan, ids[:1, :3]))[0].tolist() == [0]


def test_an_order_that_lacks_a_token_is_told(tmp_path: Path) -> None:
    target = decoder_of(plan_of(SIZES["E2B"] | WIDE | PANELS), "reference")
    assistant_of("E2B", target, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["masked_embedding.token_ordering"][3] = tensors["masked_embedding.token_ordering"][4]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = LoadOptions(model="target", draft_model=str(tmp_path), dtype="float32", kernels="reference")
    with pytest.raises(CheckpointError, match="does not name each of its 512 tokens once"):
        open_drafter(options, target, [])


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    with gemcutter.load("demo", dtype="float32", kernels=EXACT, context=1024) as model:
        yield model


@pytest.mark.parametrize("drafts", [2, 4])
def test_the_trained_pair_saves_steps(drafts: int, plain: Model) -> None:
    """As many as transformers measured, or more, and not one token is another."""
    said, prompts = golden("assistant")[f"draft_{drafts}"], golden("prompts")["prompts"]
    options: dict[str, Any] = {"draft_model": trained("tiny-e-assistant"), "speculate": "mtp", "draft_tokens": drafts}
    tokens = steps = 0
    with gemcutter.load("demo", dtype="float32", kernels=EXACT, context=1024, **options) as model:
        for prompt in prompts:
            before = model.engine.stats().steps
            asked: dict[str, Any] = {"max_tokens": 64, "ignore_eos": True, "temperature": 0}
            found, alone = (each.generate([prompt["token_ids"]], **asked)[0] for each in (model, plain))
            assert found.tokens == alone.tokens
            tokens += len(found.tokens)
            steps += model.engine.stats().steps - before
    assert tokens / steps >= said["tokens_per_target_forward"]


@pytest.mark.parametrize("drafts", [2, 4])
@pytest.mark.parametrize("offset", [0, -1])
def test_queries_may_stand_at_the_last_token_or_at_the_last_key(offset: int, drafts: int, plain: Model) -> None:
    """Engines differ here; of the trained pair either is accepted as often as transformers measured, or more."""
    said, prompts = golden("assistant")[f"draft_{drafts}"], golden("prompts")["prompts"]
    target, options = plain.decoder, LoadOptions(model="demo", draft_model=str(trained("tiny-e-assistant")), kernels=EXACT)
    published = open_drafter(options, target, [])
    assert isinstance(published, Drafter)
    assert published.decoder.plan.query_offset == 0
    moved = replace(published.decoder.plan, query_offset=offset)
    drafter = Drafter(make_decoder(moved, published.decoder.params, options, target.dtype, target.device), target)
    engine = Engine(target, 1024, speculator=Speculator(assistant=AssistantProposer(drafter), draft_tokens=drafts))
    count = 0
    for prompt in prompts:
        engine.submit(Request(tuple(prompt["token_ids"]), max_tokens=64))
        while engine.has_work:
            count += sum(event.token is not None for event in engine.step())
    assert count == 64 * len(prompts)
    assert count / engine.stats().steps >= said["tokens_per_target_forward"]


@pytest.mark.parametrize("offset", [0, -1])
def test_the_plan_says_where_queries_are_turned_to(offset: int, tmp_path: Path) -> None:
    target = decoder_of(plan_of(SIZES["E2B"] | WIDE | PANELS), "reference")
    assistant_of("E2B", target, tmp_path)
    options = LoadOptions(model="target", draft_model=str(tmp_path), dtype="float32", kernels="reference")
    published = open_drafter(options, target, [])
    assert isinstance(published, Drafter)
    moved = replace(published.decoder.plan, query_offset=offset)
    drafter = Drafter(make_decoder(moved, published.decoder.params, options, target.dtype, target.device), target)
    _, sequence, table = filled(target)
    step = AssistantProposer(drafter)._step([sequence])
    wanted = drafter.decoder.rope_tables(torch.tensor([table.length + offset]))
    assert step.rope.keys() == wanted.keys()
    assert all(
        torch.equal(mine, other) for spec, pair in wanted.items() for mine, other in zip(step.rope[spec], pair, strict=True)
    )
    assert step.positions_N.tolist() == [table.length - 1]


def test_what_is_no_assistant_of_this_model_is_told(tmp_path: Path, plain: Model) -> None:
    other = plan_of(SIZES["E2B"] | WIDE)
    with pytest.raises(RequestError, match="name its assistant, or a smaller Gemma 4"):
        open_drafter(LoadOptions(model="x", draft_model="demo", dtype="float32"), decoder_of(other, "reference"), [])
    with pytest.raises(RequestError, match="name it with draft_model"):
        gemcutter.load("demo", speculate="mtp")
    with pytest.raises(RequestError, match="draft_tokens"):
        gemcutter.load("demo", speculate="ngram", draft_tokens=9)
    with pytest.raises(ConfigError, match="not a drafter of this target"):
        open_drafter(
            LoadOptions(model="x", draft_model=str(trained("tiny-e-assistant")), dtype="float32"),
            decoder_of(plan_of(SIZES["E2B"] | WIDE), "reference"),
            [],
        )


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_an_assistant_is_quantized_beside_a_quantized_target() -> None:
    options: dict[str, Any] = {"draft_model": trained("tiny-e-assistant"), "quant": "q4", "context": 256}
    with gemcutter.load("demo", **options) as model:
        assert model.engine.speculator is not None
        assert model.engine.speculator.assistant is not None
        weight = model.engine.speculator.assistant._drafter.decoder.params["layers.0.mlp.in"]
        assert not weight.is_dense  # type: ignore[union-attr]
        assert len(model.chat("What is a lantern?", max_tokens=24, temperature=0).tokens) > 4


@pytest.mark.parametrize(("to", "quant"), [("gguf", "none"), ("gguf", "Q8_0"), ("mlx", "mlx4"), ("hf", "none")])
def test_assistants_are_converted_and_loaded_from_every_format(to: str, quant: str, tmp_path: Path, plain: Model) -> None:
    """As they are they draft the same tokens; quantized ones draft nearly as well."""
    whole, other = tmp_path / "whole", tmp_path / ("other.gguf" if to == "gguf" else "other")
    shutil.copytree(trained("tiny-e-assistant"), whole)
    shutil.copy(DEMO_FOLDER / "tokenizer.json", whole)
    convert(whole, other, to, quant)
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "temperature": 0}
    found = []
    for folder in (whole, other):
        options: dict[str, Any] = {"draft_model": folder, "speculate": "mtp", "draft_tokens": 3}
        with gemcutter.load("demo", dtype="float32", kernels=EXACT, context=256, **options) as model:
            found.append(model.chat("What is a lantern?", **asked))
    assert found[0].tokens == found[1].tokens == plain.chat("What is a lantern?", **asked).tokens
    same, mine = found[0].metrics, found[1].metrics
    assert mine.accepted_tokens >= (same.accepted_tokens if quant == "none" else same.accepted_tokens * 0.8)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_drafts_change_nothing_in_any_geometry(size: str, kernels: str, tmp_path: Path) -> None:
    """Random assistants are nearly always wrong: windows that wrap, compact layers and rows taken back leave no trace."""
    plan = plan_of(SIZES[size] | WIDE | {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB})
    target = decoder_of(plan, kernels)
    assistant_of(size, target, tmp_path)
    drafter = open_drafter(LoadOptions(model="target", draft_model=str(tmp_path), dtype="float32", kernels=kernels), target, [])
    requests = [Request(tuple(range(3 + seed, 33 + seed)), SamplingParams(1.0, seed=seed), 24) for seed in range(3)]
    replies = []
    for guesses in (None, Speculator(assistant=AssistantProposer(drafter), draft_tokens=5)):
        engine = Engine(target, 96, max_batched_tokens=20, max_num_seqs=3, speculator=guesses)
        replies.append(tokens(run(engine, requests, stagger=2)[0]))
        assert guesses is None or guesses.tally.drafted > 50
    assert kernels != "reference" or replies[0] == replies[1]
    assert all(len(each) == 24 for each in replies[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_drafts_for_itself_is_always_right(batch: int, plain: Model) -> None:
    """Prompts of several windows, drafts of all lengths, rows taken back: its own cache never lags behind nor runs ahead."""
    prompts = [prompt["token_ids"] for prompt in golden("prompts")["prompts"][: 2 * batch]]
    prompts[0] = (prompts[0] * 40)[:500]
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "temperature": 0.8, "seed": 3}
    options: dict[str, Any] = {"draft_model": "demo", "speculate": "mtp", "draft_tokens": 5, "max_num_seqs": batch}
    with gemcutter.load("demo", dtype="float32", kernels=EXACT, context=600, **options) as model:
        found = model.generate(prompts, **asked)
        assert [each.tokens for each in found] == [each.tokens for each in plain.generate(prompts, **asked)]
        assert all(each.metrics.accepted_tokens == each.metrics.drafted_tokens > 10 for each in found)
        assert model.engine.speculator is not None
        kept = model.engine.speculator.assistant
        assert isinstance(kept, DraftModelProposer)
        assert all(book.free == len(book.ref_counts) for book in kept._cache.allocators.values()), "pages were leaked"
