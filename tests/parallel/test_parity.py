"""A model on several ranks against the same on one: logits within rounding and the same text, for every format and trait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gemcutter import native
from gemcutter.api import Model, load_model
from gemcutter.checkpoint.write.synth import SIZES, write_checkpoint
from gemcutter.engine.request import Request
from gemcutter.load_options import LoadOptions
from gemcutter.ops.types import matrix
from tests.trained import GOLDENS, golden, trained

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

TOLERANCE = 2e-5  # largest difference over largest logit, in float32
TOKENS = 24
UNIT = 32  # columns of an MLP that ranks keep together, of weights that are not packed in groups
MODELS = ["tiny-e", "tiny-a", "tiny-e-mlx-4bit", "tiny-a-mlx-4bit", "tiny-e-Q4_0.gguf", "tiny-a-Q4_0.gguf"]


def path_of(name: str) -> str:
    """Return where a model is."""
    return {"tiny-e": "demo", "tiny-a": str(GOLDENS / "tiny-a")}.get(name) or str(trained(name))


@contextmanager
def model(name: str, ranks: int = 1, **options: object) -> Iterator[Model]:
    """Load a model in float32 for the time of a test; torch's threads are what they were afterwards."""
    threads = torch.get_num_threads()
    loaded = load_model(LoadOptions(model=name, tensor_parallel=ranks, **{"dtype": "float32", **options}))  # type: ignore[arg-type]
    try:
        yield loaded
    finally:
        loaded.close()
        torch.set_num_threads(threads)


def requests_of(vocab: int) -> list[Request]:
    """Return prompts shorter and longer than a window, of which some begin alike, with the logits of their ends."""
    long = tuple((7 * index + 11) % min(vocab, 4000) for index in range(300))
    prompts = [(2, 9, 4), long[:40], long, (*long[:150], 5, 6, 7), long[:100]]
    return [Request(prompt, max_tokens=TOKENS, top_logits=20, prompt_logprobs=0) for prompt in prompts]


Answer = tuple[list[int | None], list[tuple[int, float]], list[float]]


def answers(loaded: Model, requests: list[Request]) -> list[Answer]:
    """Return each request's tokens, the best logits behind its prompt, and the log-probabilities of the prompt."""
    found = []
    for events in loaded.loop.complete(requests):
        first = events[0].prompt
        assert first is not None
        found.append(([event.token for event in events], list(first.top_logits), [each.logprob for each in first.logprobs]))
    return found


def asked_of_one(path: str, **how: object) -> tuple[list[Request], list[Answer]]:
    """Return requests, and what one process answers."""
    with model(path, **how) as one:
        requests = requests_of(one.plan.vocab)
        return requests, answers(one, requests)


def compare(wanted: list[Answer], found: list[Answer], tolerance: float = TOLERANCE) -> None:
    for (tokens, logits, logprobs), (other_tokens, other_logits, other_logprobs) in zip(wanted, found, strict=True):
        assert other_tokens == tokens
        largest = max(abs(value) for _, value in logits)
        values, others = dict(logits), dict(other_logits)
        common = values.keys() & others.keys()
        assert len(common) >= len(values) - 2  # equals at the end of the list may be others
        assert max(abs(values[token] - others[token]) for token in common) <= tolerance * largest
        assert max((abs(a - b) for a, b in zip(logprobs, other_logprobs, strict=True)), default=0) <= 10 * tolerance * largest


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_one_says(name: str) -> None:
    path = path_of(name)
    requests, wanted = asked_of_one(path)
    with model(path, 2) as two:
        assert two.plan.rank is not None
        compare(wanted, answers(two, requests))
        compare(wanted, answers(two, requests))  # from the prefix cache


def test_a_trained_model_on_two_ranks_says_what_its_oracle_says() -> None:
    goldens = golden("tiny-e")["prompts"]
    with model("demo", 2) as two:
        requests = [Request(tuple(each["token_ids"]), max_tokens=len(each["greedy_ids"])) for each in goldens]
        for events, each in zip(two.loop.complete(requests), goldens, strict=True):
            assert [event.token for event in events if event.token is not None][: len(each["greedy_ids"])] == each["greedy_ids"]


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: str, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path / "model")
    path = str(tmp_path / "model")
    with model(path) as one:
        requests = requests_of(one.plan.vocab)
        layer = one.plan.layers[0]
        wanted = answers(one, requests)
    for ranks in (2, 4, 8):
        if layer.heads % ranks == 0 and layer.mlp_width >= ranks * UNIT:
            with model(path, ranks) as many:
                compare(wanted, answers(many, requests))


@pytest.mark.parametrize("how", [{}, {"kernels": "reference"}, {"max_batched_tokens": 16, "max_num_seqs": 2}])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tiny-e")])
def test_ranks_that_share_the_table_of_per_layer_embeddings(name: str, how: dict[str, object]) -> None:
    path = path_of(name)
    requests, wanted = asked_of_one(path, **how)
    with model(path, 2, ple="split", **how) as two:
        rows = matrix(two.decoder.params, "embed.ple").parts[0].shape[0]
        assert rows == two.plan.ple_rows.size < two.plan.ple_vocab
        compare(wanted, answers(two, requests))


def test_ranks_of_the_last_stage_share_the_table_of_per_layer_embeddings() -> None:
    path = path_of("tiny-e")
    requests, wanted = asked_of_one(path)
    with model(path, 2, pipeline_parallel=2, ple="split") as four:
        compare(wanted, answers(four, requests))


@pytest.mark.parametrize("name", ["tiny-e", "tiny-a"])
@pytest.mark.parametrize("how", [{"kernels": "reference"}, {"max_batched_tokens": 16, "max_num_seqs": 2}, {"quant": "q4"}])
def test_other_kernels_chunks_and_weights_quantized_at_load(name: str, how: dict[str, object]) -> None:
    path = path_of(name)
    requests, wanted = asked_of_one(path, **how)
    with model(path, 2, **how) as two:
        compare(wanted, answers(two, requests))


def test_the_fast_path_differs_by_rounding_alone() -> None:
    """Rows in int8 and a cache in bfloat16: a rank rounds other sums than one process."""
    path = path_of("tiny-e-Q4_0.gguf")
    requests, wanted = asked_of_one(path, dtype="bfloat16")
    with model(path, 2, dtype="bfloat16") as two:
        for (_, logits, _), (_, others, _) in zip(wanted, answers(two, requests), strict=True):
            values, found = dict(logits), dict(others)
            assert max(abs(values[token] - found[token]) for token in values.keys() & found.keys()) < 0.3
