"""Write what sgl-eval asks and how it judges replies, for the made-up data of `tests/evals/made_up.py`.

It needs an environment of its own, since sgl-eval's requirements conflict with the development environment's:

    python -m venv sgl && sgl/bin/pip install sgl-eval==0.1.3
    sgl/bin/python tests/goldens/evals/make_sgl_eval.py
"""

from __future__ import annotations

import importlib
import json
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sgl_eval._vendored.nemo_skills.evaluator.math import MathEvaluator
from sgl_eval.evals import _math, _multichoice, _registry
from sgl_eval.evals._prompts import render_prompt, resolve_prompt
from sgl_eval.types import Example, GenConfig, Sample

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.evals import made_up  # noqa: E402

COUNT = 20
DATASETS = "sgl_eval._vendored.nemo_skills.dataset"


def prepared(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return made-up rows as a data set's own script prepares them."""
    module: Any = importlib.import_module(f"{DATASETS}.{name}.prepare")
    if name == "mmlu_pro":
        return [module.format_entry(row) for row in made_up.mmlu_pro("computer science", "test", COUNT)]
    module.__file__ = str(folder / "prepare.py")  # the script writes beside itself
    if name == "mmlu":
        made_up.write_hendrycks(folder, {"test": made_up.mmlu("college_physics", "test", COUNT)})
        with tarfile.open(folder / "made.tar", "w") as packed:
            packed.add(folder / "data", "data")
        module.URL = (folder / "made.tar").as_uri()
    else:
        made_up.write_lines(folder / "source" / "test.jsonl", made_up.gsm8k("test", COUNT))
        module.URL = (folder / "source").as_uri() + "/{}.jsonl"
    module.save_data("test")
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def prompts(name: str) -> list[str]:
    """Return the prompts of made-up rows."""
    _, prompt = _registry._resolve_upstream_metadata(name)
    with tempfile.TemporaryDirectory() as folder:
        return [render_prompt(resolve_prompt(prompt), problem=row["problem"]) for row in prepared(name, Path(folder))]


def letters() -> list[list[Any]]:
    """Return replies, each with the right letter, the letter that is read out of it, and the score."""
    judge, found = _multichoice.make_score_one_fn(), []
    for number, reply in enumerate(made_up.letter_replies()):
        gold = "ABCDEFGHIJ"[number % 10]
        score, letter = judge(Example("", {}, gold), Sample(reply))
        found.append([reply, gold, letter, score])
    return found


def numbers() -> list[list[Any]]:
    """Return replies, each with the right number, what is read out of it, and the score."""
    judge, found = _math.make_score_one_fn(MathEvaluator({})), []
    for number, reply in enumerate(made_up.number_replies()):
        right = made_up.GSM8K_ANSWERS[number % len(made_up.GSM8K_ANSWERS)]
        for gold in dict.fromkeys((right, *(each for each in made_up.GSM8K_ANSWERS if each in reply))):
            value = float(gold.replace(",", ""))
            score, answer = judge(Example("", {}, int(value) if value == int(value) else value), Sample(reply))
            found.append([reply, gold, answer, score])
    return found


def main() -> None:
    """Write the golden file."""
    defaults = GenConfig()
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    found = {
        "tool": "sgl-eval",
        "version": version("sgl-eval"),
        "sampling": {name: getattr(defaults, name) for name in names},
        "prompts": {name: prompts(name) for name in ("mmlu", "mmlu_pro", "gsm8k")},
        "letters": letters(),
        "numbers": numbers(),
    }
    (Path(__file__).parent / "sgl_eval.json").write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n")


main()
