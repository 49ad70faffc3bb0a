"""What the serving benchmark asks, and when: lengths against the tokenizers library, arrivals against distributions, files."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from PIL import Image

from gemcutter.bench_serve import files, generated
from gemcutter.bench_serve.arrivals import arrival_times
from gemcutter.bench_serve.generated import SharedPrefixes, TextSource
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import RequestError
from gemcutter.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_FOLDER)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    """Return the library's tokenizer of the same vocabulary, the oracle of lengths."""
    found = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    found.no_truncation()
    return found


def length(library: tokenizers.Tokenizer, text: Any) -> int:
    return len(library.encode(text, add_special_tokens=False).ids)


# ---- lengths ----


def test_random_prompts_have_exactly_their_length(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    source = TextSource(tokenizer, 1)
    for tokens in (1, 2, 3, 17, 100, 999):
        workload = generated.random_workload(source, 4, tokens, 20)
        for request in (*workload.requests, workload.warmup):
            assert length(library, request.turns[0].prompt) == request.turns[0].prompt_len == tokens
            assert request.turns[0].output_len == 20


def test_lengths_of_a_range_are_uniform_as_in_sglang(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    workload = generated.random_workload(TextSource(tokenizer, 2), 400, 40, 10, range_ratio=0.5)
    lengths = [request.turns[0].prompt_len or 0 for request in workload.requests]
    assert (min(lengths), max(lengths)) == (20, 40)
    assert statistics.fmean(lengths) == pytest.approx(30, abs=4 * math.sqrt((21**2 - 1) / 12 / 400))
    assert [length(library, request.turns[0].prompt) for request in workload.requests] == lengths
    assert {request.turns[0].output_len for request in workload.requests} == set(range(5, 11))


def test_ids_are_exact_and_begin_with_bos(tokenizer: Tokenizer) -> None:
    workload = generated.random_workload(TextSource(tokenizer, 3, as_ids=True), 5, 33, 4)
    for request in workload.requests:
        ids = request.turns[0].prompt
        assert isinstance(ids, tuple)
        assert (len(ids), ids[0], tokenizer.bos_id in ids[1:]) == (33, tokenizer.bos_id, False)
        assert not set(ids[1:]) & tokenizer.special_ids


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_group_shares_exactly_its_beginning(as_ids: bool, tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    shape = SharedPrefixes(3, 4, 70, 25, 8)
    workload = generated.shared_prefixes(TextSource(tokenizer, 4, as_ids=as_ids), shape)
    prompts = [request.turns[0].prompt for request in (*workload.requests, workload.warmup)]
    ids = [
        list(prompt) if isinstance(prompt, tuple) else library.encode(prompt, add_special_tokens=False).ids for prompt in prompts
    ]
    assert [len(each) for each in ids] == [95] * 13
    assert all(request.turns[0].prompt_len == 95 for request in workload.requests)
    groups = [sum(1 for _ in group) for _, group in groupby(sorted(each[:70] for each in ids))]
    assert sorted(groups) == [1, 4, 4, 4]  # the warm-up has a beginning of its own
    assert len({tuple(each) for each in ids}) == 13


def test_groups_come_mixed_unless_ordered(tokenizer: Tokenizer) -> None:
    def beginnings(is_ordered: bool) -> list[Any]:
        shape = SharedPrefixes(4, 6, 20, 10, 8, is_ordered=is_ordered)
        workload = generated.shared_prefixes(TextSource(tokenizer, 5), shape)
        return [str(request.turns[0].prompt).split("\n\n")[0] for request in workload.requests]

    assert len(list(groupby(beginnings(True)))) == 4
    assert len(list(groupby(beginnings(False)))) > 8


def test_a_question_must_be_longer_than_the_separator(tokenizer: Tokenizer) -> None:
    between = len(tokenizer.encode_plain("\n\n"))
    with pytest.raises(RequestError, match=f"--gsp-question-len: expected more than the separator's {between} tokens"):
        generated.shared_prefixes(TextSource(tokenizer, 6), SharedPrefixes(1, 1, 20, between, 8))


def test_seeds_repeat_texts_and_differ(tokenizer: Tokenizer) -> None:
    def texts(seed: int) -> list[Any]:
        workload = generated.random_workload(TextSource(tokenizer, seed), 3, 12, 4)
        return [request.turns[0].prompt for request in workload.requests]

    assert texts(7) == texts(7)
    assert not set(texts(7)) & set(texts(8))


def test_conversations_and_images_have_their_lengths(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    source = TextSource(tokenizer, 9)
    talk = generated.conversations(source, 2, 3, 50, 11, 8)
    assert [[length(library, turn.prompt) for turn in each.turns] for each in talk.requests] == [[50, 11, 11]] * 2
    assert talk.turns == 6
    pictured = generated.image_workload(source, 1, 1, (40, 24), 13, 8).requests[0].turns[0]
    kind, _, data = pictured.images[0].partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (kind, image.size, image.format) == ("data:image/jpeg", (40, 24), "JPEG")
    assert length(library, pictured.prompt) == 13


# ---- arrivals ----


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_spread_of_a_gamma_distribution(burstiness: float) -> None:
    count, rate = 40_000, 5.0
    times = arrival_times(count, rate, burstiness, seed=1)
    assert times[0] == 0
    gaps = [later - earlier for earlier, later in pairwise(times)]
    variation = 1 / math.sqrt(burstiness)
    assert statistics.fmean(gaps) * rate == pytest.approx(1, abs=5 * variation / math.sqrt(count))
    assert statistics.stdev(gaps) * rate == pytest.approx(variation, rel=0.05)
    if burstiness == 1:  # Poisson: the share of gaps beyond t is exp(-rate t)
        for after_s in (0.1, 0.3, 0.6):
            share = sum(gap > after_s for gap in gaps) / len(gaps)
            assert share == pytest.approx(math.exp(-rate * after_s), abs=5 * 0.5 / math.sqrt(count))


def test_other_arrivals() -> None:
    assert arrival_times(4, 2.0, math.inf) == pytest.approx([0, 0.5, 1.0, 1.5])
    assert arrival_times(3, math.inf) == [0, 0, 0]
    assert arrival_times(0, 1.0) == []
    exact = arrival_times(50, 4.0, 0.5, seed=3, exact_rate=True)
    assert exact[-1] == pytest.approx(50 / 4.0)
    assert exact[0] > 0
    assert exact == sorted(exact)
    assert arrival_times(9, 1.0, seed=5) == arrival_times(9, 1.0, seed=5) != arrival_times(9, 1.0, seed=6)


# ---- files ----


def test_share_gpt_gives_first_questions_and_lengths_of_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "share.json"
    good = [
        {
            "conversations": [
                {"from": "human", "value": f"Tell me of the sea {n}"},
                {"from": "gpt", "value": "It is wide and " * n},
            ]
        }
        for n in range(1, 6)
    ]
    bad = [
        {"conversations": [{"from": "gpt", "value": "first word"}, {"from": "human", "value": "second word"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "an answer to nothing"}]},
        {"other": 1},
    ]
    path.write_text(json.dumps(good + bad))
    found = files.share_gpt(path, 5, 1, tokenizer)
    expected = {
        each["conversations"][0]["value"]: len(tokenizer.encode_plain(each["conversations"][1]["value"])) for each in good
    }
    assert {each.turns[0].prompt: each.turns[0].output_len for each in found.requests} == expected
    assert {each.turns[0].output_len for each in files.share_gpt(path, 5, 1, tokenizer, 77).requests} == {77}
    with pytest.raises(RequestError, match="has 5 usable requests, 6 were asked for"):
        files.share_gpt(path, 6, 1, tokenizer)
    with pytest.raises(RequestError, match="--tokenizer: needed"):
        files.share_gpt(path, 1, 1, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"own\.jsonl:1: no JSON"),
        ("[]", r"own\.jsonl:1: expected an object"),
        ("{}", "expected one of prompt, messages and turns, found none"),
        ('{"prompt": "a", "turns": ["b"]}', "found prompt, turns"),
        ('{"prompt": 3}', "prompt: expected text"),
        ('{"turns": []}', "turns: expected text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages: expected text, the last message the user's"),
        ('{"prompt": "a", "output_len": 0}', "output_len: expected a number of tokens"),
        ('{"prompt": "a", "output_len": true}', "output_len: expected a number of tokens"),
        ("", "has 0 usable requests"),
    ],
)
def test_bad_lines_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        files.own_lines(path, None, None, 5)


def test_own_lines_have_their_lengths(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "A lamp", "output_tokens": 7}\n\n{"turns": ["A", "B"]}\n{"prompt": "last"}')
    found = files.own_lines(path, 2, tokenizer, 5)
    assert [[(turn.output_len, turn.prompt_len) for turn in each.turns] for each in found.requests] == [
        [(7, len(tokenizer.encode_plain("A lamp")))],
        [(5, 1), (5, 1)],
    ]
    with pytest.raises(RequestError, match="can't be read"):
        files.own_lines(tmp_path / "absent", None, None, 5)
