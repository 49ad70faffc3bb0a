"""The modes that are lm-eval's, against lm-eval itself on made-up data: prompts character for character, and every score.

Owns no data: `made_up.py` has it. Read `test_sgl_eval_tasks.py` for sgl-eval's modes, `test_data_layouts.py` for other layouts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.evals.data import Data
from gemcutter.evals.run import items_of
from gemcutter.evals.task import Asked, Item, Mode, Reply, Task
from gemcutter.evals.tasks import find_mode, open_task
from tests.evals import lm_eval_oracle, made_up
from tests.evals.lm_eval_oracle import MadeUpModel

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep lm-eval's data sets in the test's folder, and from the network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def ours(name: str, mode: str, folder: Path, **asked: Any) -> tuple[Task, Mode, Asked, list[Item]]:
    task = open_task(name)
    found, options = find_mode(task, mode), Asked(**asked)
    return task, found, options, items_of(task, Data.of(name, None, str(folder)), found, options)


def compare(
    asking: tuple[Task, Mode, Asked, list[Item]], theirs: list[lm_eval_oracle.Asked], names: dict[str, str]
) -> dict[str, list[float]]:
    """Compare prompts and scores; `names` are our metrics by lm-eval's. Returns all our scores."""
    task, mode, asked, items = asking
    assert [item.prompt for item in items] == [other.prompt for other in theirs]
    found: dict[str, list[float]] = {name: [] for name in names.values()}
    for item, other in zip(items, theirs, strict=True):
        continuations = tuple(item.delimiter + choice for choice in item.choices)
        assert continuations == other.continuations
        logprobs = tuple(lm_eval_oracle.logprob(str(item.prompt), each) for each in continuations)
        grade = task.grade(item, mode, Reply(logprobs, other.reply), asked)
        assert {name: grade.metrics[mine] for name, mine in names.items()} == {name: other.metrics[name] for name in names}
        for name in names.values():
            found[name].append(grade.metrics[name])
    return found


def assert_mixed(scores: dict[str, list[float]]) -> None:
    """Assert that some answers were right and some wrong, without which equal scores prove nothing."""
    assert all(set(values) == {0.0, 1.0} for values in scores.values()), scores


def write(folder: Path, name: str, rows: list[made_up.Row]) -> Path:
    file = folder / f"{name}.parquet"
    made_up.write_parquet(file, rows)
    return file


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize(("mode", "original"), [("ll", "default"), ("lm-eval-generate", "generative")])
def test_mmlu(tmp_path: Path, mode: str, original: str, shots: int) -> None:
    splits = {
        split: write(tmp_path / "all", f"{split}-00000-of-00001", made_up.mmlu("college_physics", split, count))
        for split, count in (("test", 24), ("dev", 5))
    }
    model = MadeUpModel([*"ABCD", " b.", "(c)", "D\n", " A\nB", "", "x", "A B"])
    theirs = lm_eval_oracle.ask(tmp_path, f"mmlu/{original}/mmlu_college_physics.yaml", splits, model, num_fewshot=shots)
    metric = "acc" if mode == "ll" else "exact_match,get_response"
    assert_mixed(compare(ours("mmlu", mode, tmp_path, shots=shots), theirs, {metric: "accuracy"}))


def test_mmlu_pro(tmp_path: Path) -> None:
    categories = ("computer science", "math")
    splits = {
        split: write(
            tmp_path / "data", f"{split}-00000-of-00001", [row for c in categories for row in made_up.mmlu_pro(c, split, count)]
        )
        for split, count in (("test", 20), ("validation", 5))
    }
    model = MadeUpModel([reply for letter in "ABCaD" for reply in (f"so the answer is ({letter}).", f"answer is {letter}", "no")])
    asking = ours("mmlu-pro", "lm-eval", tmp_path)
    for category in categories:
        name = category.replace(" ", "_")
        theirs = lm_eval_oracle.ask(tmp_path, f"mmlu_pro/mmlu_pro_{name}.yaml", splits, model)
        mine = (*asking[:3], [item for item in asking[3] if item.subject == category])
        assert_mixed(compare(mine, theirs, {"exact_match,custom-extract": "accuracy"}))


@pytest.mark.parametrize(("mode", "original"), [("lm-eval", "gsm8k"), ("lm-eval-cot", "gsm8k-cot")])
def test_gsm8k(tmp_path: Path, mode: str, original: str) -> None:
    splits = {
        split: write(tmp_path / "main", f"{split}-00000-of-00001", made_up.gsm8k(split, count))
        for split, count in (("test", 30), ("train", 40))
    }
    model = MadeUpModel(
        [f"{form} {answer}." for form in ("####", "The answer is") for answer in ("7", "$18", "1042", "64", "-3")]
    )
    theirs = lm_eval_oracle.ask(tmp_path, f"gsm8k/{original}.yaml", splits, model)
    names = {f"exact_match,{name}": name for name in ("strict-match", "flexible-extract")}
    assert_mixed(compare(ours("gsm8k", mode, tmp_path), theirs, names))


@pytest.mark.parametrize("shots", [0, 4])
def test_hellaswag(tmp_path: Path, shots: int) -> None:
    splits = {
        split: write(tmp_path / "data", f"{split}-00000-of-00001", made_up.hellaswag(split, count))
        for split, count in (("validation", 24), ("train", 12))
    }
    theirs = lm_eval_oracle.ask(tmp_path, "hellaswag/hellaswag.yaml", splits, MadeUpModel([""]), num_fewshot=shots)
    assert_mixed(compare(ours("hellaswag", "ll", tmp_path, shots=shots), theirs, {"acc": "acc", "acc_norm": "acc_norm"}))


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("part", ["ARC-Easy", "ARC-Challenge"])
def test_arc(tmp_path: Path, part: str, shots: int) -> None:
    splits = {
        split: write(tmp_path / part, f"{split}-00000-of-00001", made_up.arc(part, split, count))
        for split, count in (("test", 24), ("train", 12), ("validation", 4))
    }
    original = f"arc/{part.lower().replace('-', '_')}.yaml"
    theirs = lm_eval_oracle.ask(tmp_path, original, splits, MadeUpModel([""]), num_fewshot=shots)
    assert_mixed(compare(ours(part.lower(), "ll", tmp_path, shots=shots), theirs, {"acc": "acc", "acc_norm": "acc_norm"}))


def test_arc_as_a_conversation(tmp_path: Path) -> None:
    splits = {
        split: write(tmp_path / "ARC-Challenge", f"{split}-00000-of-00001", made_up.arc("ARC-Challenge", split, count))
        for split, count in (("test", 24), ("train", 4), ("validation", 4))
    }
    model = MadeUpModel([" A", "B", " c", "(D)", "", "E"])
    theirs = lm_eval_oracle.ask(
        tmp_path, "arc/arc_challenge_chat.yaml", splits, model, apply_chat_template=True, fewshot_as_multiturn=True
    )
    for other in theirs:
        messages, adds_prompt = json.loads(other.prompt)
        assert not adds_prompt
        other.prompt = messages
    asking = ours("arc-challenge", "lm-eval-chat", tmp_path)
    assert all(item.options == {"continue_final_message": True} for item in asking[3])
    assert_mixed(compare(asking, theirs, {"exact_match,remove_whitespace": "accuracy"}))


def test_caps_and_stops_are_lm_evals() -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads task files without the functions that they name."""

    Loader.add_multi_constructor("!", lambda *_: None)
    places = {
        ("mmlu", "lm-eval-generate"): "mmlu/generative/_default_template_yaml",
        ("mmlu-pro", "lm-eval"): "mmlu_pro/_default_template_yaml",
        ("gsm8k", "lm-eval"): "gsm8k/gsm8k.yaml",
        ("gsm8k", "lm-eval-cot"): "gsm8k/gsm8k-cot.yaml",
        ("arc-challenge", "lm-eval-chat"): "arc/arc_challenge_chat.yaml",
    }
    for (task, name), place in places.items():
        theirs = yaml.load((lm_eval_oracle.TASKS / place).read_text(), Loader)["generation_kwargs"]
        mode = find_mode(open_task(task), name)
        assert set(mode.stop) == set(theirs["until"])
        assert mode.max_tokens == theirs.get("max_gen_toks", 256)
