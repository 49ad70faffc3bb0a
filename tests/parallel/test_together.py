"""Ranks together with all else that requests use: adapters, assistants, forks of prefixes, 8-bit caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gemcutter import native
from gemcutter.api import Model
from gemcutter.engine.request import Request
from tests.images import drawing
from tests.parallel.test_parity import answers, compare, model, path_of, requests_of
from tests.trained import release_folder, trained

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

QUESTIONS = ["What is a lantern?", "Tell me of the sea.", "Who keeps the light?"]


def texts(loaded: Model, adapter: str | None = None, **how: Any) -> list[str]:
    """Return greedy and sampled replies."""
    found = [
        loaded.chat([{"role": "user", "content": question}], max_tokens=40, adapter=adapter, seed=3, **how)
        for question in QUESTIONS
        for how in ({"temperature": 0.0}, {"temperature": 1.0})
    ]
    return [each.text for each in found]


def test_an_assistant_changes_no_reply_and_drafts_as_well() -> None:
    assistant = str(trained("tiny-e-assistant"))
    with model("demo") as plain:
        wanted = texts(plain)
    tallies = []
    for ranks in (1, 2):
        with model("demo", ranks, draft_model=assistant, draft_tokens=3) as drafting:
            assert texts(drafting) == wanted
            tallies.append(drafting.engine.stats().tally)
    assert tallies[0] == tallies[1]
    assert tallies[0].accepted > 0


def test_lookups_change_no_reply() -> None:
    with model("demo") as plain, model("demo", 2, speculate="ngram") as drafting:
        assert texts(drafting) == texts(plain)


@pytest.mark.parametrize("name", ["tiny-e", "tiny-e-mlx-4bit"])
def test_adapters_merged_apart_and_loaded_while_serving(name: str) -> None:
    path, adapter = path_of(name), str(trained("tiny-e-lora"))
    with model(path, adapter=adapter) as merged, model(path, adapters={"lamp": adapter}) as apart:
        requests = requests_of(merged.plan.vocab)
        wanted_merged, wanted_apart = answers(merged, requests), texts(apart, "lamp")
        wanted_plain = texts(apart)
    assert wanted_apart != wanted_plain
    with model(path, 2, adapter=adapter) as two:
        compare(wanted_merged, answers(two, requests))
    with model(path, 2, adapters={"lamp": adapter}) as two:
        assert texts(two, "lamp") == wanted_apart
        assert texts(two) == wanted_plain
    with model(path, 2) as two:
        assert texts(two) == wanted_plain
        two.load_adapter("lamp", adapter)
        assert texts(two, "lamp") == wanted_apart
        two.unload_adapter("lamp")
        two.load_adapter("other", adapter)
        assert texts(two, "other") == wanted_apart
        assert texts(two) == wanted_plain


def test_prefixes_are_shared_and_forked_on_all_ranks() -> None:
    with model("demo") as one, model("demo", 2) as two:
        long = tuple((13 * index + 5) % 4000 for index in range(200))
        rounds = [[Request((*long[: 150 + 7 * each], each + 3), max_tokens=12) for each in range(6)] for _ in range(2)]
        for requests in rounds:
            wanted, found = one.loop.complete(requests), two.loop.complete(requests)
            assert [[event.token for event in events] for events in found] == [
                [event.token for event in events] for events in wanted
            ]
        assert two.engine.stats().prefix_hits > 0


def test_a_cache_in_eight_bits() -> None:
    """Codes of keys and values may fall to the other side where sums differ in their last bits."""
    with model("demo", kv="int8") as one, model("demo", 2, kv="int8") as two:
        requests = requests_of(one.plan.vocab)
        compare(answers(one, requests), answers(two, requests), tolerance=5e-3)


def reply_to_drawing(folder: Path, digits: int, ranks: int = 1, **how: Any) -> tuple[str, list[float]]:
    """Return what is said of an image, and the log-probabilities, rounded."""
    file = folder / "drawing.png"
    Image.fromarray(drawing(96, 64)).save(file)
    parts = [{"type": "image", "image": str(file)}, {"type": "text", "text": "What is this?"}]
    with model(str(release_folder()), ranks, media=("image",), **how) as loaded:
        reply = loaded.chat([{"role": "user", "content": parts}], max_tokens=30, logprobs=0, temperature=0.0)
        return reply.text, [round(each.logprob, digits) for each in reply.logprobs or ()]


def test_images(tmp_path: Path) -> None:
    """The tower is the leader's alone; what it makes of an image enters the layers of all ranks."""
    found = [reply_to_drawing(tmp_path, 3, ranks) for ranks in (1, 2)]
    assert found[0] == found[1]
