"""Gemma 4 topologies in miniature: as transformers models, the oracle, and as gemcutter decoders over the same weights.

Owns the five published sizes shrunk, the hypothesis strategy that draws others, random weights under which every norm, scale
and gate matters, and the two ways to run a prompt (`oracle` and `run_alone`) with every layer's output. Refuses to judge: the
tolerances live in the tests. Read `tests/parity/test_topologies.py` next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from transformers import logging as transformers_logging
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4_unified import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

from gemcutter import config as configs
from gemcutter import native
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.checkpoint.formats import hf
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, derive
from gemcutter.quant import Weight

transformers_logging.set_verbosity_error()  # it warns of rope keys that it then obeys

# The definitions, and the fastest kernels, where there are others than those.
KERNELS = [
    "reference",
    pytest.param("auto", marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))),
]

Raw = dict[str, Any]  # a config.json object in the published spelling
SLIDING, FULL = "sliding_attention", "full_attention"
VOCAB = 60
TOLERANCE = 2e-5  # largest difference over largest value of the oracle, both in float32


def _size(pattern: int, layers: int, **traits: Any) -> Raw:
    """Write a shrunk size: every `pattern`-th layer global, widths of a few dozen, all else as published."""
    kinds = [SLIDING if (index + 1) % pattern else FULL for index in range(layers)]
    common: Raw = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 4096,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 30.0,
    }
    return common | traits


SIZES: dict[str, Raw] = {
    "E2B": _size(
        5,
        10,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
    ),
    "E4B": _size(6, 12, num_attention_heads=8, num_key_value_heads=2, num_kv_shared_layers=6, hidden_size_per_layer_input=6),
    "12B": _size(
        6,
        6,
        model_type="gemma4_unified_text",
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
    ),
    "26B-A4B": _size(
        6,
        6,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=12,
    ),
    "31B": _size(
        6,
        12,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
    ),
}


@st.composite
def topologies(draw: st.DrawFn, shares: bool, experts: bool) -> Raw:
    """Draw a config of a decoder that transformers can build; `shares` and `experts` say whether it has such layers."""
    layers = draw(st.integers(2 if shares else 1, 8))
    kinds = [*draw(st.lists(st.sampled_from((SLIDING, FULL)), min_size=layers - 1, max_size=layers - 1)), FULL]
    if shares and FULL not in kinds[:-1]:
        kinds[0] = FULL  # the last layer is global, so that a global one must write for it
    counts = [count for count in range(1, layers) if set(kinds[: layers - count]) == set(kinds)]  # every type needs a writer
    if shares and not counts:
        kinds, counts = [FULL] * layers, list(range(1, layers))
    heads = draw(st.sampled_from((4, 6, 8, 2, 3, 1)))
    groupings = sorted((count for count in range(1, heads + 1) if heads % count == 0), key=lambda count: count in (1, heads))
    raw: Raw = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": draw(st.integers(16, 48)),
        "intermediate_size": draw(st.integers(16, 40)),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from(groupings)),
        "num_global_key_value_heads": draw(st.sampled_from([None, *groupings])),
        "head_dim": draw(st.sampled_from((4, 6, 8, 10, 14, 16))),
        "global_head_dim": draw(st.sampled_from((4, 6, 8, 12, 18, 20))),
        "sliding_window": draw(st.integers(1, 14)),
        "num_kv_shared_layers": draw(st.sampled_from(counts)) if shares else 0,
        "attention_k_eq_v": draw(st.booleans()),
        "use_double_wide_mlp": draw(st.booleans()),
        "hidden_size_per_layer_input": draw(st.sampled_from((0, 4, 7, 12))),
        "final_logit_softcapping": draw(st.sampled_from((None, 30.0))),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-2))),  # the large one shows where eps goes in
        "tie_word_embeddings": draw(st.booleans()),
        "use_bidirectional_attention": draw(st.sampled_from((None, "vision"))),  # says nothing about text
        "rope_parameters": {SLIDING: draw(_ropes(("default",))), FULL: draw(_ropes(("default", "proportional")))},
    }
    if experts:
        num_experts = draw(st.integers(1, 6))
        raw |= {
            "enable_moe_block": True,
            "num_experts": num_experts,
            "top_k_experts": draw(st.integers(1, num_experts)),
            "moe_intermediate_size": draw(st.integers(12, 24)),
        }
    return raw


@st.composite
def _ropes(draw: st.DrawFn, kinds: tuple[str, ...]) -> Raw:
    rope: Raw = {"rope_type": draw(st.sampled_from(kinds)), "rope_theta": draw(st.sampled_from((100.0, 1e4, 1e6)))}
    if rope["rope_type"] == "proportional":
        rope["partial_rotary_factor"] = draw(st.sampled_from((0.25, 0.5, 0.75, 1.0)))
        rope["factor"] = draw(st.sampled_from((1.0, 8.0)))
    return rope


def build_oracle(raw: Raw, seed: int = 0) -> PreTrainedModel:
    """Build the transformers model of a config, with random weights in float32."""
    kwargs = {key: value for key, value in raw.items() if key != "model_type"}
    if raw["model_type"] == "gemma4_unified_text":
        model = Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**kwargs, attn_implementation="eager"))
    else:
        config = Gemma4TextConfig(**kwargs, attn_implementation="eager", experts_implementation="eager")
        model = Gemma4ForCausalLM(config)
    # Asked to record states, transformers leaves out its own skipping of rows, which fails without per-layer embeddings.
    model.config.output_hidden_states = True
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill a model so that no parameter can be left out or taken for another unseen.

    Matrices keep the size of what they multiply; vectors lie around 1; logits reach the bend of the soft cap; the router's
    chances differ; per-layer gates stay open, since norms would blow up the rounding of closed ones.
    """
    sizes = {
        "embed_tokens.weight": 5.0,
        "lm_head.weight": 5.0,
        "router.proj.weight": 2 * model.config.hidden_size**0.5,
        "per_layer_input_gate.weight": 0.2,
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name.endswith(("inv_freq", "embed_scale")):
            continue
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
            continue
        fan_in = model.config.hidden_size_per_layer_input if "embed_tokens_per_layer" in name else tensor.shape[-1]
        size = next((size for suffix, size in sizes.items() if name.endswith(suffix)), 1.0)
        tensor.normal_(0.0, size * fan_in**-0.5, generator=generator)


def plan_of(raw: Raw) -> ModelPlan:
    """Derive the plan of a config."""
    return derive(configs.read(raw))


def saved_config(model: PreTrainedModel) -> Raw:
    """Return the config as `save_pretrained` spells it: sizes of global layers in `per_layer_config`."""
    raw: Raw = json.loads(model.config.to_json_string())
    return raw


def build_decoder(model: PreTrainedModel, plan: ModelPlan, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> Decoder:
    """Build the decoder of a plan over a transformers model's weights, as `dtype`.

    The plan's parameters must be the model's own, one for one: what is missing raises KeyError, what is left over AssertionError.
    """
    state = dict(model.state_dict())
    if plan.tied_head:
        del state["lm_head.weight"]
    params = {spec.name: _take(spec, state, dtype) for spec in plan.params()}
    assert not state, f"parameters that the plan does not know: {sorted(state)}"
    return Decoder(plan, params, dtype, "cpu", kernels)


def _take(spec: ParamSpec, state: dict[str, Tensor], dtype: torch.dtype) -> Weight | Tensor:
    if len(spec.shape) == 1:
        return state.pop(hf.spell(spec.name, None)).float()
    names = tuple(part for part, _ in spec.parts)
    if spec.name.endswith("moe.in"):
        whole = state.pop(hf.spell(spec.name, None)).to(dtype)
        return Weight(whole.split([rows for _, rows in spec.parts], dim=-2), names)
    return Weight(tuple(state.pop(hf.spell(spec.name, part)).to(dtype) for part in names or (None,)), names)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Draw token ids."""
    return tuple(torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


@dataclass(frozen=True, slots=True)
class Trace:
    """What a prompt's rows became: every layer's output and the final-normed states [N, D], and the logits [N, V]."""

    layers: tuple[Tensor, ...]
    states: Tensor
    logits: Tensor
    margin: float = 1.0  # by how much the router preferred the last chosen expert to the next, at worst, relatively


@torch.no_grad()
def oracle(model: PreTrainedModel, ids: tuple[int, ...]) -> Trace:
    """Run transformers over a whole prompt at once."""
    layers, states, margins = list[Tensor](), list[Tensor](), [1.0]

    def note_router(module: torch.nn.Module, _: Any, output: tuple[Tensor, ...]) -> None:
        chances = output[0].sort(-1, descending=True).values
        top_k = output[2].shape[-1]
        if top_k < chances.shape[-1]:
            margins.append(float((1 - chances[:, top_k] / chances[:, top_k - 1]).min()))

    def note(into: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: into.append(output[0].clone())

    hooks = [layer.register_forward_hook(note(layers)) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_hook(note(states)))
    routers = [module for name, module in model.named_modules() if name.endswith("router")]
    hooks += [router.register_forward_hook(note_router) for router in routers]
    try:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(tuple(layers), states[0], logits, min(margins))


def poison(pool: PagedKVCache) -> None:
    """Fill a cache with NaN; where it is int8, with codes that nobody writes beside scales of NaN."""
    for layer in pool.keys:
        scaled = pool.int8(layer)
        for tensor in (pool.keys[layer], pool.values[layer]):
            tensor.fill_(torch.nan if scaled is None else -128)
        if scaled is not None:
            scaled.key_scales_TK.fill_(torch.nan)
            scaled.value_scales_TK.fill_(torch.nan)


@torch.inference_mode()
def run_alone(
    decoder: Decoder,
    ids: tuple[int, ...],
    chunk: int,
    page_tokens: int = 64,
    keep_all: bool = True,
    kv_dtype: torch.dtype | None = None,
) -> Trace:
    """Run a prompt alone, `chunk` rows a step, in a cache of `page_tokens` a page that holds NaN wherever nothing was written.

    With `keep_all` every row goes through all layers; else only the last, and the trace holds what was left of the rows. The
    cache is kept in `kv_dtype`, None: in the decoder's dtype.
    """
    counts = page_counts(decoder.plan, len(ids), chunk, page_tokens=page_tokens)
    pool = PagedKVCache(decoder.plan, counts, kv_dtype or decoder.dtype)
    poison(pool)
    sequence = SequenceState(0, Request(ids, hidden_states=keep_all))
    sequence.table = table = BlockTable(pool)
    layers: list[list[Tensor]] = [[] for _ in decoder.plan.layers]
    states = []
    while table.length < len(ids):
        work = ScheduledChunk.of(sequence, table, min(chunk, len(ids) - table.length))
        table.reserve(work.rows)
        found = decoder.forward(build_step(decoder, [work]), pool, lambda index, x_ND: layers[index].append(x_ND.clone()))
        table.commit(work.rows)
        states.append(found)
    outputs = tuple(torch.cat(chunks) if chunks else torch.empty(0) for chunks in layers)
    return Trace(outputs, torch.cat(states), decoder.logits(torch.cat(states)))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the oracle's largest value; NaN wherever there is one."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} found, {tuple(wanted.shape)} wanted"
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def mismatches(found: Trace, wanted: Trace, tolerance: float = TOLERANCE) -> dict[str, float]:
    """List where two traces differ by more than `tolerance`; the first layer listed is where it began."""
    assert len(found.layers) == len(wanted.layers)
    errors = {f"layer {i}": relative_error(*pair) for i, pair in enumerate(zip(found.layers, wanted.layers, strict=True))}
    errors |= {"states": relative_error(found.states, wanted.states), "logits": relative_error(found.logits, wanted.logits)}
    return {place: error for place, error in errors.items() if not error <= tolerance}
