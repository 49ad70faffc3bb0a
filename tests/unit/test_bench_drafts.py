"""What `bench` says of drafts: replays are right as often as asked for, counts add up, and what is decoded stays what it was.

Owns runs of narrow presets on the reference kernels, whose rows never depend on their neighbours, and of the trained pair. No
speed is tested.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from bench import speculation
from gemcutter import native
from gemcutter.benchmark import cold_start, drafts, hardware
from gemcutter.benchmark.drafts import DraftRuns, DraftSetup, measure, play, set_up_replay
from gemcutter.benchmark.harness import BenchCase, BenchEngine, Decoded
from gemcutter.benchmark.replay import check_acceptance
from gemcutter.benchmark.report import show
from gemcutter.benchmark.target import BenchTarget, from_file, from_preset
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.cli.bench_questions import QUESTIONS, encode_questions
from gemcutter.engine.speculate.draft_length import StepCosts
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.errors import RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.text.tokenizer import Tokenizer
from tests.trained import trained

PATTERN = (0.9, 0.6, 0.3)
EXACT = "reference" if native.missing() else "auto"  # kernels whose rows never depend on their neighbours


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine in milliseconds, start no process, and learn little before the clock starts."""
    monkeypatch.setattr(drafts, "WARM_UP_TOKENS", 4)
    monkeypatch.setattr(hardware, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "MATMUL_SIZE", 64)
    monkeypatch.setattr(cold_start, "first_token_s", lambda *arguments: (0.5, 0.75))


@functools.cache
def preset(name: str = "tiny:E2B") -> BenchTarget:
    return from_preset(name, "bf16", 6, LoadOptions(model=name, kernels="reference", dtype="float32"))


def replay(count: int | None, name: str = "tiny:E2B") -> DraftSetup:
    return set_up_replay(name, "bf16", preset(name).decoder, preset(name).how, PATTERN, count)


def run(test: BenchCase, setup: DraftSetup, repeats: int, name: str = "tiny:E2B") -> DraftRuns:
    return measure(BenchEngine(preset(name).decoder, [test], speculator=setup.make()), test, setup, repeats)


# ---- replays ----


def test_each_place_is_right_as_often_as_asked_for() -> None:
    runs = run(BenchCase("tg", 80), replay(3), 1)
    found = runs.as_object()
    shares = [right / found["bursts"] for right in found["accepted_at"][:3]]
    assert shares == pytest.approx(PATTERN, abs=0.15)
    assert found["accepted_at"][3:] == [0] * (MOST_DRAFTS - 3)
    assert sum(found["accepted_at"]) == found["accepted"]
    assert found["same_replies"]


@pytest.mark.parametrize("count", [2, None])
def test_a_step_gives_a_token_and_those_that_were_right(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the counts of a single stream add up; those of the warm-up are not among them."""
    observe = StepCosts.observe  # a busy machine's times may say that guesses are not worth it: here all steps take equally long
    monkeypatch.setattr(StepCosts, "observe", lambda self, rows, seconds, keys=0: observe(self, rows, 1.0, keys))
    (test, repeats), setup = (BenchCase("tg", 24), 2), replay(count)
    found = run(test, setup, repeats).as_object()
    assert found["steps"] + found["accepted"] == test.tokens * repeats
    assert found["tokens_per_step"] == test.tokens * repeats / found["steps"] > 1.2
    assert found["accepted"] <= found["drafted"]
    assert found["to_plain"] > 0


@pytest.mark.parametrize("name", ["tiny:12B", "tiny:26B-A4B"])
def test_other_sizes_have_assistants_too(name: str) -> None:
    assert run(BenchCase("tg", 20), replay(2, name), 1, name).tally.accepted > 5


def test_a_context_is_the_same_in_every_run_of_a_prompt() -> None:
    """Replies of a batch fill the cache of prefixes, and what was filled without being computed can't be computed again."""
    test, setup = BenchCase("tg", 64, depth=100, batch=4), replay(2)
    stand = BenchEngine(preset().decoder, [test], speculator=setup.make())
    prompts = stand.draw(1, 4)
    first, second = (stand.decode(prompts, 65).replies for _ in range(2))
    assert first == second


def test_a_replay_that_changes_a_reply_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replay(2)
    stand = BenchEngine(preset().decoder, [BenchCase("tg", 4)], speculator=setup.make())
    answers = iter([Decoded(((1, 2),), 2, 2, 1.0), Decoded(((1, 3),), 2, 2, 1.0)])
    monkeypatch.setattr(stand, "decode", lambda *arguments: next(answers))
    with pytest.raises(RequestError, match=r"with drafts \(two\) one of 1 replies became another"):
        play(stand, [(7,)], 3, {"two": setup.make()})


def test_replies_of_real_models_that_differ_are_told() -> None:
    same, other = (Decoded(((1, token),), 2, 2, 1.0) for token in (2, 3))
    assert DraftRuns((same,), (same,), preset_tally()).as_object()["same_replies"]
    assert not DraftRuns((same,), (other,), preset_tally()).as_object()["same_replies"]


def preset_tally() -> Any:
    return replay(1).make().tally


@pytest.mark.parametrize("shares", [(), (1.2,), (0.5, 0.6), (0.5, -0.1), (0.5,) * 9, (float("nan"),)])
def test_shares_that_no_drafts_have_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="expected 1 to 8 shares from 1 to 0, none above the one before it"):
        check_acceptance(shares)


def test_shares_may_stay_or_fall_to_nothing() -> None:
    assert check_acceptance([1, 1, 0.5, 0]) == (1, 1, 0.5, 0)


# ---- the command ----

PRESET = "--preset tiny:E2B --layers 5 --quant bf16 --kernels reference --dtype float32 -p 4 -n 8 -r 1 --batch 1 3"


def bench(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["bench", *words.split()]) == 0
    return capsys.readouterr().out


def test_a_preset_plays_a_pattern_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(bench(capsys, f"{PRESET} --acceptance .9 .6 --draft-tokens 2 --json"))
    assert found["speculation"] == {"kind": "replay", "acceptance": [0.9, 0.6], "draft_tokens": 2}
    prompt, one, three = found["rows"]
    assert "speculation" not in prompt
    for row in (one, three):
        own = row["speculation"]
        assert own["tokens_per_step"] > 1
        assert own["same_replies"]
        assert row["tok_s"] / own["plain_tok_s"] == pytest.approx(own["to_plain"])  # of one run
        assert row["tpot_s"] == pytest.approx(row["batch"] / row["tok_s"])
    assert found["memory"]["draft_model_bytes"] > 0
    shown = show(found)
    assert "replay: drafts are right at each place as often as was asked for (0.90 0.60)" in shown
    assert "; 2 at a time" in shown
    assert "\ntg8x3  " in shown.partition("replay:")[2]


def test_without_drafts_nothing_is_said_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(bench(capsys, f"{PRESET} --json"))
    assert found["speculation"] is None
    assert not any("speculation" in row for row in found["rows"])
    assert found["memory"]["draft_model_bytes"] == 0
    assert "replay" not in show(found)


def test_a_real_assistant_is_measured_on_real_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"demo --kernels {EXACT} --dtype float32 --draft-model {trained('tiny-e-assistant')} -p 0 -n 20 -r 1 --batch 1 2"
    found = json.loads(bench(capsys, f"{words} --speculate mtp --draft-tokens 3 --json"))
    about = found["speculation"]
    assert (about["kind"], about["speculate"], about["draft_tokens"]) == ("measured", "mtp", 3)
    assert about["text"] == f"{len(QUESTIONS)} questions, past their ends"
    for row in found["rows"]:
        own = row["speculation"]
        assert own["same_replies"]
        assert own["accepted"] > own["bursts"] / 2  # the pair was trained on text of this kind
        assert own["accepted_at"][3:] == [0] * (MOST_DRAFTS - 3)
    assert f"drafts by {about['draft_model']}; greedy replies to {len(QUESTIONS)} questions" in show(found)


def test_lookups_are_measured_without_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    shown = bench(capsys, "demo --speculate ngram -p 0 -n 8 -r 1")
    assert "drafts looked up in the text; greedy replies to" in shown
    assert "; as many as pay at a time" in shown


def test_a_smaller_model_may_draft(capsys: pytest.CaptureFixture[str]) -> None:
    """Here the model itself, which is always right."""
    words = f"demo --kernels {EXACT} --dtype float32 --draft-model demo --speculate mtp --draft-tokens 3"
    (row,) = json.loads(bench(capsys, f"{words} -p 0 -n 9 -r 1 --batch 9 --json"))["rows"]
    own = row["speculation"]
    assert own["accepted"] == own["drafted"] > 0
    assert own["same_replies"]


def test_questions_are_asked_as_the_checkpoint_wants_them(tmp_path: Any) -> None:
    checkpoint, tokenizer = open_checkpoint(DEMO_FOLDER), Tokenizer.load(DEMO_FOLDER, 0)
    prompts = encode_questions(checkpoint)
    assert len(set(prompts)) == len(QUESTIONS) >= 8
    for prompt, question in zip(prompts, QUESTIONS, strict=True):
        text = tokenizer.decode(prompt, special=True)
        assert question in text
        assert "<|turn>" in text
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    assert encode_questions(open_checkpoint(tmp_path))[0] == tuple(tokenizer.encode(QUESTIONS[0]))


def test_a_model_without_options_of_drafts_has_none() -> None:
    assert from_file(LoadOptions(model="demo")).drafts is None
    found = from_file(LoadOptions(model="demo", speculate="ngram")).drafts
    assert found is not None
    assert (found.about["speculate"], found.about["draft_model"], found.nbytes) == ("ngram", None, 0)


# ---- the script ----


def test_the_script_plays_the_counts_of_drafts_that_it_is_given() -> None:
    words = "--preset tiny:E2B --layers 5 --quant bf16 --kernels reference -n 6 -r 1 --batch 1 2 --drafts 3 auto"
    found = speculation.measure(speculation.parse([*words.split(), "--acceptance", ".9", ".5"]))
    assert [(row["batch"], row["drafts"]) for row in found["rows"]] == [
        (batch, drafts) for batch in (1, 2) for drafts in ("off", "3", "auto")
    ]
    assert all(row["to_off_min"] <= row["to_off"] <= row["to_off_max"] for row in found["rows"])
    assert speculation.table(found).splitlines()[2].startswith("| 1 | off | ")
    assert len(speculation.table(found).splitlines()) == 2 + 6


@pytest.mark.parametrize("word", ["0", "9", "-1", "many"])
def test_counts_that_are_none_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speculation.parse(["--drafts", word])
    assert "expected 1 to 8 or auto" in capsys.readouterr().err
