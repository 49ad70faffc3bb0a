"""lm-eval run on local files with a made-up model: what it asked, and how it judged each answer.

Its own task files are included by their place in the package; only where the data lies is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from tests.evals.made_up import pick

TASKS = Path(lm_eval.__file__).parent / "tasks"


def logprob(context: str, continuation: str) -> float:
    """Return the made-up model's log-likelihood: some are equal, so that ties are seen."""
    return -1.0 - pick(context, continuation, of=40) / 4


@dataclass
class Asked:
    """One question as lm-eval asked it, with each filter's metrics."""

    prompt: str
    continuations: tuple[str, ...]
    reply: str
    metrics: dict[str, float] = field(default_factory=dict)


class MadeUpModel(LM):
    """A model whose answers depend on a hash of the prompt."""

    def __init__(self, replies: Sequence[str]) -> None:
        super().__init__()
        self.replies = replies

    def reply(self, prompt: str) -> str:
        """Return the reply to a prompt."""
        return self.replies[pick(prompt, of=len(self.replies))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return made-up log-likelihoods."""
        return [(logprob(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return nothing of use: no task here asks for it."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the replies to prompts."""
        return [self.reply(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as JSON, with whether the last message is to be continued."""
        return json.dumps([chat_history, add_generation_prompt])

    @property
    def tokenizer_name(self) -> str:
        """Return a name, which lm-eval asks for where there is a template."""
        return "made-up"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return a template's source, which lm-eval writes down."""
        return "made-up"


def ask(folder: Path, original: str, splits: dict[str, Path], model: MadeUpModel, **options: Any) -> list[Asked]:
    """Return what lm-eval asks of local files in the order of its documents, by one of its own tasks."""
    name = f"local_{Path(original).stem}"
    task = {
        "include": str(TASKS / original),
        "task": name,
        "dataset_path": "parquet" if next(iter(splits.values())).suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in splits.items()}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **options
    )
    found = dict[int, Asked]()
    for sample in results["samples"][name]:
        calls = sample["arguments"]
        generates = not isinstance(calls[0][1], str)
        continuations = () if generates else tuple(call[1] for call in calls)
        asked = found.setdefault(sample["doc_id"], Asked(calls[0][0], continuations, sample["resps"][0][0] if generates else ""))
        for metric in sample["metrics"]:
            suffix = "" if sample["filter"] in ("none", "") else f",{sample['filter']}"
            asked.metrics[metric + suffix] = float(sample[metric])
    return [found[number] for number in sorted(found)]
