"""Write what bfcl-eval 2026.3.23 says of made-up calls, and how it declares functions, to bfcl.json.

Run it in an environment with bfcl-eval (its own dependencies are not needed): python tests/goldens/evals/make_bfcl.py
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

HERE = Path(__file__).parent
MODEL = "any"


class Stubs:
    """Stands for the clients of other companies' servers, which the checker's module imports and never calls."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Take what is not installed, and nothing of bfcl-eval itself."""
        if name.startswith("bfcl_eval"):
            return None
        sys.modules.setdefault(name, MagicMock())
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: Any) -> Any:
        """Return the stub."""
        return sys.modules[spec.name]

    def exec_module(self, module: Any) -> None:
        """Do nothing."""


sys.meta_path.append(Stubs())
config = ModuleType("bfcl_eval.constants.model_config")
config.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=True)}
sys.modules["bfcl_eval.constants.model_config"] = config

from bfcl_eval.constants.enums import Language, ModelStyle  # noqa: E402
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402
from bfcl_eval.model_handler.utils import convert_to_tool  # noqa: E402

VALUES = [
    3,
    3.0,
    2.5,
    "3",
    True,
    None,
    "",
    "New York",
    "new-york",
    "NEW YORK.",
    "it's",
    [1, 2],
    [2, 1],
    [1.0, 2],
    [],
    ["a b", "C"],
]
VALUES += [
    ["ab", "c"],
    {"x": 1, "y": "Up"},
    {"x": 1},
    {"x": 1, "y": "down"},
    {"z": 2},
    [{"x": 1, "y": "up"}],
    [{"x": 2}],
    {},
    "var",
]


def verdict(functions: list[Any], calls: list[Any], right: list[Any], part: str) -> bool:
    """Return whether the checker takes calls for the right ones."""
    return bool(ast_checker(functions, copy.deepcopy(calls), right, Language.PYTHON, part, MODEL)["valid"])


def changed(calls: list[Any], draw: random.Random) -> list[Any]:
    """Return calls with a change or two: another value, a parameter more or less, another name, order or number."""
    calls = copy.deepcopy(calls)
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        call = draw.choice(calls)
        name = next(iter(call))
        what = draw.randrange(10)
        if what < 6 and call[name]:
            call[name][draw.choice(sorted(call[name]))] = draw.choice(VALUES)
        elif what == 6 and call[name]:
            del call[name][draw.choice(sorted(call[name]))]
        elif what == 7:
            call[name][draw.choice(("extra", "unit"))] = draw.choice(VALUES)
        elif what == 8:
            call[draw.choice((name, name.replace("_", "."), "other"))] = call.pop(name)
        else:
            draw.shuffle(calls)
            calls += draw.choice(([], [], calls[:1]))
    return calls


if __name__ == "__main__":
    made = json.loads((HERE / "bfcl_questions.json").read_text())
    draw, cases = random.Random(8), []
    for question in made:
        for _ in range(60):
            calls, valid = changed(question["calls"], draw), None
            try:
                valid = verdict(question["function"], calls, question["ground_truth"], question["id"])
            except (TypeError, AttributeError, KeyError):
                continue  # the checker itself fails on these
            cases.append([question["id"], calls, valid])
    tools = {each["id"]: convert_to_tool(each["function"], GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS) for each in made}
    found = {"made_by": f"bfcl-eval {importlib.metadata.version('bfcl-eval')}", "tools": tools, "cases": cases}
    (HERE / "bfcl.json").write_text(json.dumps(found) + "\n")
    print(len(cases), sum(case[2] for case in cases))
