"""The public façade over the packaged demo model: prompts of every kind in, text, streams and reports out, clear refusals.

Uses the reference kernels in float32, so that alone and in company are the same bit for bit. Knows nothing of kernels and pages
beyond counting the free ones. Read `tests/parity` for whether the model is right at all.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gemcutter
from gemcutter import Completion, KernelError, Model, RequestError, SamplingParams
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import COPIED
from gemcutter.checkpoint.write.write_safetensors import write_json, write_safetensors
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.load_options import LoadOptions
from gemcutter.ops.triton import backend as triton_backend

ROOT = Path(__file__).parents[2]
TEXT = "The king"
THANKS = [{"role": "user", "content": "Thank you."}]  # the demo answers in six tokens
WATER = [{"role": "user", "content": "What is water?"}]


@pytest.fixture(scope="module")
def shared() -> Model:
    """Load the demo once."""
    return gemcutter.load("demo", dtype="float32", kernels="reference")


@pytest.fixture
def model(shared: Model) -> Model:
    """Return the demo with nothing cached, and insist that a test leaves no request behind."""
    assert not is_busy(shared)
    forget_prefixes(shared)
    return shared


def pages(model: Model) -> dict[int | None, tuple[int, int]]:
    """Count the free pages and all pages of every group."""
    return {window: (book.free, len(book.ref_counts)) for window, book in model.engine.pool.allocators.items()}


def is_busy(model: Model) -> bool:
    return model.loop.run(lambda engine: engine.has_work)


def forget_prefixes(model: Model) -> None:
    """Empty the prefix cache."""

    def evict(engine: gemcutter.Engine) -> None:
        while engine.prefix.evict():
            pass

    model.loop.run(evict)


def assert_all_free(model: Model) -> None:
    """Check that nobody holds a page once the checkpoints are gone."""
    forget_prefixes(model)
    for free, every in pages(model).values():
        assert free == every


# ---- prompts ----


def test_eight_bit_keys_are_refused_where_no_kernel_reads_them() -> None:
    with pytest.raises(KernelError, match=r"kv fp8: a choice of the Triton kernels.*; on a CPU use kv int8"):
        gemcutter.load("demo", kv="fp8")
    for kernels in ("auto", "reference"):
        with pytest.raises(KernelError, match="kv int8: a choice for models on a CPU; on a GPU use kv fp8"):
            LoadOptions(model="demo", kv="int8", device="cuda:0", kernels=kernels)
    with pytest.raises(KernelError, match="kv: expected fp8 or int8, found 'fp4'"):
        gemcutter.load("demo", kv="fp4")


def test_a_text_gives_a_completion_and_a_list_gives_a_list(model: Model) -> None:
    one = model.generate(TEXT, max_tokens=4)
    assert isinstance(one, Completion)
    assert one.prompt_tokens == tuple(model.tokenizer.encode(TEXT, bos=True))
    assert (len(one.tokens), one.finish_reason) == (4, "length")
    assert one.text == model.tokenizer.decode(one.tokens, special=False)
    (listed,) = model.generate([TEXT], max_tokens=4)
    assert (listed.text, listed.tokens) == (one.text, one.tokens)
    assert model.generate([], max_tokens=4) == []


def test_texts_ids_and_conversations_go_together_in_one_batch(model: Model) -> None:
    ids = tuple(model.tokenizer.encode("Of the sea", bos=True))
    alone = [model.generate(TEXT, max_tokens=6), model.generate([ids], max_tokens=6)[0], model.chat(THANKS, max_tokens=6)]
    assert model.template is not None
    assert alone[1].prompt_tokens == ids
    assert alone[2].prompt_tokens == tuple(model.template.encode(THANKS))
    together = model.generate([TEXT, ids, THANKS], max_tokens=6)
    assert [found.tokens for found in together] == [found.tokens for found in alone]
    assert [found.text for found in together] == [found.text for found in alone]


@pytest.mark.parametrize(
    "prompt",
    [None, 5, 2.5, [1, "a"], [2, 5.0], [2, True], b"text", [THANKS[0], "and"], {"role": "user"}, [], [4096], [-1], ["a", "b"]],
    ids=repr,
)
def test_other_prompts_are_refused(prompt: Any, model: Model) -> None:
    with pytest.raises(RequestError):
        model.stream(prompt, max_tokens=1)
    with pytest.raises(RequestError):
        model.generate([TEXT, prompt], max_tokens=1)
    assert not is_busy(model)  # the good prompt beside it was withdrawn


@pytest.mark.parametrize("prompts", [None, 5, [2, 5, 7], THANKS, THANKS[0], b"text"], ids=repr)
def test_generate_takes_a_text_or_a_list_of_prompts(prompts: Any, model: Model) -> None:
    with pytest.raises(RequestError):
        model.generate(prompts, max_tokens=1)


def test_tensors_are_no_prompts(model: Model) -> None:
    with pytest.raises(RequestError, match="list of token ids"):
        model.stream(torch.tensor([2, 3]), max_tokens=1)  # type: ignore[arg-type]


def test_too_long_a_prompt_is_refused() -> None:
    small = gemcutter.load("demo", context=8)
    with pytest.raises(RequestError, match="8 tokens, the context holds 8"):
        small.generate([[5] * 8], max_tokens=1)
    (full,) = small.generate([[5] * 7], max_tokens=9, ignore_eos=True)
    assert (len(full.tokens), full.finish_reason) == (1, "length")


# ---- streams ----


@pytest.mark.parametrize("prompt", [TEXT, THANKS], ids=["text", "chat"])
def test_a_stream_is_the_completion_in_pieces(prompt: Any, model: Model) -> None:
    (whole,) = model.generate([prompt], max_tokens=8)
    chunks = list(model.stream(prompt, max_tokens=8))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert {chunk.kind for chunk in chunks} == {"content"}
    assert len(chunks) > 4
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    found = chunks[-1].completion
    assert found is not None
    assert (found.text, found.tokens, found.finish_reason) == (whole.text, whole.tokens, whole.finish_reason)


def test_streams_read_in_turns_equal_their_solo_results(model: Model) -> None:
    prompts: list[Any] = [TEXT, "Of the sea", THANKS]
    alone = [model.generate([prompt], max_tokens=7)[0] for prompt in prompts]
    streams = [model.stream(prompt, max_tokens=7) for prompt in prompts]
    texts, ends = [""] * 3, list[Completion | None]([None] * 3)
    while None in ends:
        for index, stream in enumerate(streams):
            for _ in range(index + 1):  # at different paces
                chunk = next(stream, None)
                if chunk is not None:
                    texts[index] += chunk.text
                    ends[index] = chunk.completion
    assert texts == [found.text for found in alone]
    assert [end.tokens for end in ends if end is not None] == [found.tokens for found in alone]


def test_closing_a_stream_frees_its_pages_and_keeps_what_it_computed(model: Model) -> None:
    other = model.stream("Of the sea", max_tokens=5)
    text = "The king of Israel said unto the prophet, and"
    stream = model.stream(text, max_tokens=500)
    for _ in range(4):
        next(stream)
    stream.close()
    assert list(stream) == []
    rest = other.finish()
    assert not is_busy(model)
    assert rest.text == model.generate("Of the sea", max_tokens=5).text

    again = model.generate(text, max_tokens=3)
    assert again.metrics.cached_tokens == len(again.prompt_tokens) - 1  # the last prompt token is always computed
    assert_all_free(model)
    assert model.generate(text, max_tokens=3).tokens == again.tokens


@pytest.mark.parametrize("leave", ["close", "drop"])
@pytest.mark.parametrize("read", [0, 1, 3])
def test_a_stream_that_is_left_ends_its_request(leave: str, read: int, model: Model) -> None:
    stream = model.stream(TEXT, max_tokens=50)
    for _ in range(read):
        next(stream)
    assert is_busy(model)
    if leave == "close":
        stream.close()
        stream.close()  # once more does no harm
    else:
        del stream
        gc.collect()
    assert not is_busy(model)
    assert_all_free(model)


# ---- where a reply ends ----


def test_tokens_exclude_the_stop_token(model: Model) -> None:
    answer = model.chat(THANKS, max_tokens=20)
    assert answer.finish_reason == "stop"
    assert 1 < len(answer.tokens) < 20
    assert not model.defaults.stop_ids & {*answer.tokens}
    assert answer.text == model.tokenizer.decode(answer.tokens, special=True)  # no marker in it either
    beyond = model.chat(THANKS, max_tokens=len(answer.tokens) + 3, ignore_eos=True)
    assert beyond.finish_reason == "length"
    assert beyond.tokens[: len(answer.tokens)] == answer.tokens
    assert beyond.tokens[len(answer.tokens)] in model.defaults.stop_ids


def test_max_tokens_that_just_suffice(model: Model) -> None:
    """With room for the reply and no more, nobody knows yet that the next token would have ended it."""
    length = len(model.chat(THANKS, max_tokens=20).tokens)
    assert model.chat(THANKS, max_tokens=length).finish_reason == "length"
    assert model.chat(THANKS, max_tokens=length + 1).finish_reason == "stop"


def test_stop_strings_end_a_text_and_are_not_part_of_it(model: Model) -> None:
    whole = model.generate(TEXT, max_tokens=12, stop=None).text  # " of the king of Israel, ..."
    stop = whole[9:14]  # within words, across tokens
    cut = model.generate(TEXT, max_tokens=12, stop=["never met", stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < 12
    chunks = list(model.stream(TEXT, max_tokens=12, stop=[stop]))
    assert "".join(chunk.text for chunk in chunks) == cut.text
    unmet = model.generate(TEXT, max_tokens=12, stop=[whole[-3:] + "?"])  # begins, but never completes
    assert (unmet.text, unmet.finish_reason) == (whole, "length")
    assert not is_busy(model)


@pytest.mark.parametrize("stop", ["king", [""], [3], ["a", ""]], ids=repr)
def test_bad_stop_strings_are_refused(stop: Any, model: Model) -> None:
    with pytest.raises(RequestError, match="stop"):
        model.generate(TEXT, max_tokens=1, stop=stop)


# ---- reports ----


def test_scores_and_states_of_a_prompt(model: Model) -> None:
    text = "In the beginning God created the heaven"
    found = model.generate(text, max_tokens=0, prompt_logprobs=2, hidden_states=True, top_logits=3)
    ids = found.prompt_tokens
    assert (found.text, found.tokens, found.finish_reason) == ("", (), "length")
    states = torch.cat(found.prompt.hidden_states)
    assert states.shape == (len(ids), model.plan.hidden)
    logits = model.decoder.logits(states)
    assert [entry.token for entry in found.prompt.logprobs] == list(ids[1:])
    for row, entry in zip(logits.log_softmax(-1), found.prompt.logprobs, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
    assert [token for token, _ in found.prompt.top_logits] == logits[-1].topk(3).indices.tolist()
    assert found.prompt.top_logits[0][1] == pytest.approx(float(logits[-1].max()), abs=1e-5)
    greedy = model.generate(text, max_tokens=1, suppress=())
    assert greedy.tokens == (found.prompt.top_logits[0][0],)


def test_states_of_a_prompt_in_chunks(model: Model) -> None:
    chunked = gemcutter.load("demo", dtype="float32", kernels="reference", max_batched_tokens=4)
    options: dict[str, Any] = {"max_tokens": 2, "hidden_states": True, "prompt_logprobs": 0}
    text = "In the beginning God created the heaven"
    whole, parts = (each.generate(text, **options) for each in (model, chunked))
    sizes = [len(rows) for rows in parts.prompt.hidden_states]
    assert sum(sizes) == len(parts.prompt_tokens)
    assert set(sizes[:-1]) == {4}
    assert torch.cat(parts.prompt.hidden_states).equal(torch.cat(whole.prompt.hidden_states))
    assert parts.prompt.logprobs == whole.prompt.logprobs
    assert parts.tokens == whole.tokens


def test_nothing_is_reported_unasked(model: Model) -> None:
    found = model.generate(TEXT, max_tokens=2)
    assert (found.logprobs, found.prompt.logprobs, found.prompt.hidden_states, found.prompt.top_logits) == ((), [], [], ())


def test_logprobs_come_one_a_token(model: Model) -> None:
    found = model.generate(TEXT, max_tokens=5, logprobs=3)
    assert [entry.token for entry in found.logprobs] == list(found.tokens)
    for entry in found.logprobs:
        assert isinstance(entry, TokenLogprobs)
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token, entry.logprob)  # greedy takes the likeliest
        assert sorted((value for _, value in entry.top), reverse=True) == [value for _, value in entry.top]
        assert entry.logprob < 0
    ended = model.chat(THANKS, max_tokens=20, logprobs=0)
    assert [entry.token for entry in ended.logprobs] == list(ended.tokens)  # none for the stop token


def test_metrics(model: Model) -> None:
    started = time.perf_counter()
    first, second = model.generate([TEXT, "Of the sea"], max_tokens=6, ignore_eos=True)
    elapsed = time.perf_counter() - started
    for found in (first, second):
        metrics = found.metrics
        assert metrics.prefill_tokens + metrics.cached_tokens == len(found.prompt_tokens)
        assert metrics.decode_tokens == 5
        assert metrics.ttft_s > 0
        assert metrics.decode_s > 0
        assert metrics.ttft_s + metrics.decode_s <= elapsed
        assert metrics.decode_s > elapsed / 10  # five steps of six, whichever stream was read first
    assert model.load_s > 0


def test_a_second_turn_finds_the_first_in_the_cache(model: Model) -> None:
    first = model.chat(THANKS, max_tokens=20)
    assert first.metrics.cached_tokens == 0
    messages = [*THANKS, {"role": "assistant", "content": first.text}, *WATER]
    second = model.chat(messages, max_tokens=4)
    assert second.prompt_tokens[: len(first.prompt_tokens)] == first.prompt_tokens
    assert second.metrics.cached_tokens >= len(first.prompt_tokens) + len(first.tokens) - 1
    assert second.metrics.prefill_tokens == len(second.prompt_tokens) - second.metrics.cached_tokens
    forget_prefixes(model)
    fresh = model.chat(messages, max_tokens=4)
    assert fresh.metrics.cached_tokens == 0
    assert fresh.tokens == second.tokens


# ---- sampling ----


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(model: Model) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "max_tokens": 6}
    alone = model.generate(TEXT, seed=7, **options)
    batch = model.generate(["Of the sea", TEXT, THANKS], seed=7, **options)
    assert batch[1].tokens == alone.tokens
    assert model.generate(TEXT, sampling=SamplingParams(temperature=1.0, top_k=50, seed=7), max_tokens=6).tokens == alone.tokens
    others = {model.generate(TEXT, seed=seed, **options).tokens for seed in (8, 9)}
    assert others != {alone.tokens}


def test_placeholders_are_suppressed_unless_asked_for(model: Model) -> None:
    token = model.defaults.suppress[0]
    bias = {token: 1000.0}
    assert model.generate(TEXT, max_tokens=1, logit_bias=bias).tokens != (token,)
    assert model.generate(TEXT, max_tokens=1, logit_bias=bias, suppress=()).tokens == (token,)


# ---- options ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temprature": 1.0, "n": 2}, ["n", "temprature"]),
        ({"max_new_tokens": 3}, ["max_new_tokens"]),
        ({"sampling": SamplingParams(), "top_k": 3}, ["top_k"]),
        ({"top_p": 2.0, "min_p": 1.5}, ["top_p", "min_p"]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"max_tokens": "5"}, ["max_tokens"]),
        ({"top_logits": -1}, ["top_logits"]),
        ({"prompt_logprobs": -1}, ["prompt_logprobs"]),
        ({"logprobs": -1}, ["logprobs"]),
        ({"logit_bias": {4096: 1.0}}, ["logit_bias"]),
        ({"suppress": (-1,)}, ["suppress"]),
        ({"enable_thinking": True}, ["enable_thinking"]),  # these two are a template's, and a raw text has none
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, ["tools"]),
    ],
    ids=repr,
)
def test_options_that_would_mean_nothing_are_refused(options: dict[str, Any], named: list[str], model: Model) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate(TEXT, **options)
    assert all(name in str(caught.value) for name in named)
    assert not is_busy(model)


def test_a_checkpoint_without_a_template_does_not_chat(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", *COPIED):
        if name != "chat_template.jinja":
            (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    base = gemcutter.load(str(tmp_path))
    with pytest.raises(RequestError, match="no chat template"):
        base.chat(THANKS, max_tokens=1)
    assert len(base.generate(TEXT, max_tokens=2).tokens) == 2


# ---- loading ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:N, found 'tpu'"),
        ({"device": "mps"}, "device: expected cpu, cuda or cuda:N, found 'mps'"),
        ({"dtype": "float16"}, "dtype float16: .* use bfloat16 or float32"),
        ({"dtype": "fp8"}, "dtype: expected float32 or bfloat16, found 'fp8'"),
        ({"kernels": "fast"}, "kernels: expected auto, triton or reference, found 'fast'"),
    ],
    ids=repr,
)
def test_kernels_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        gemcutter.load("demo", **options)


@pytest.mark.parametrize("finds", [None, True])
def test_triton_is_refused_where_it_cannot_run(finds: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: finds)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = (
        "kernels triton: runs on a CPU only under TRITON_INTERPRET=1" if finds else "kernels triton: Triton is not installed"
    )
    with pytest.raises(KernelError, match=message):
        gemcutter.load("demo", kernels="triton")


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="torch finds no CUDA device"):
        gemcutter.load("demo", device="cuda")


@pytest.mark.parametrize(
    "limits",
    [{"context": 0}, {"context": -5}, {"max_batched_tokens": 0}, {"max_num_seqs": 0}, {"prefix_cache_bytes": -1}],
    ids=repr,
)
def test_limits_that_leave_no_room_are_refused(limits: dict[str, Any]) -> None:
    (name,) = limits
    with pytest.raises(RequestError, match=name):
        gemcutter.load("demo", **limits)


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.bfloat16), ("f32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_compute_dtype_is_the_checkpoints_own_unless_asked(asked: str | None, dtype: torch.dtype) -> None:
    assert gemcutter.load("demo", dtype=asked).decoder.dtype == dtype


def test_an_assistant_alone_is_refused(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma4_text",
        "vocab_size": 12,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_kv_shared_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "global_head_dim": 2,
    }
    write_json(tmp_path / "config.json", {"model_type": "gemma4_assistant", "backbone_hidden_size": 6, "text_config": text})
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (4,) for norm in norms}
    layer |= {"self_attn.q_proj.weight": (2, 4), "self_attn.q_norm.weight": (2,), "self_attn.o_proj.weight": (4, 2)}
    layer |= {f"mlp.{name}_proj.weight": (4, 4) for name in ("gate", "up", "down")}
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (12, 4), "model.norm.weight": (4,)}
    shapes |= {"pre_projection.weight": (4, 12), "post_projection.weight": (6, 4)}
    specs = [(name, "F32", shape) for name, shape in shapes.items()]
    write_safetensors(tmp_path / "model.safetensors", specs, (torch.ones(shape) for shape in shapes.values()))
    with pytest.raises(RequestError, match="is an assistant: it drafts for its target"):
        gemcutter.load(str(tmp_path))


def test_progress_is_told_while_loading() -> None:
    calls = list[tuple[int, int]]()
    gemcutter.load("demo", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 20_000_000


# ---- the package ----


def test_public_names_resolve_lazily() -> None:
    assert set(gemcutter.__all__) <= set(dir(gemcutter))
    for name in gemcutter.__all__:
        assert getattr(gemcutter, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'gemcutter' has no attribute 'nothing'"):
        _ = gemcutter.nothing
    code = """
import gemcutter, sys
dir(gemcutter)
assert "torch" not in sys.modules
gemcutter.load
assert "torch" in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_there_are_examples() -> None:
    assert len(list((ROOT / "examples").glob("*.py"))) >= 5
