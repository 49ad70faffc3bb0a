"""lm-eval's local-completions and local-chat-completions on a task of a few lines. Run as SCRIPT URL TASK.jsonl; prints JSON."""

import json
import os
import sys
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
import lm_eval

url, lines = sys.argv[1:]
DATA = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": lines}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
CHOICE = {
    **DATA,
    "task": "lamps_choice",
    "output_type": "multiple_choice",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
FREE = {
    **DATA,
    "task": "lamps_free",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
COMMON = {"model": "demo", "num_concurrent": 1, "max_retries": 1, "max_length": 512}


def run(kind: str, path: str, task: dict, **more: object) -> list:
    """Return what the harness got for each line of the task."""
    arguments = {**COMMON, "base_url": f"{url}{path}", **more}
    chat = kind == "local-chat-completions"
    found = lm_eval.simple_evaluate(kind, model_args=arguments, tasks=[task], apply_chat_template=chat, bootstrap_iters=0)
    return [each["resps"] for each in sorted(found["samples"][task["task"]], key=lambda each: each["doc_id"])]


remote = {"tokenizer_backend": "remote", "tokenized_requests": True}
choice = run("local-completions", "/v1/completions", CHOICE, **remote)
free = run("local-completions", "/v1/completions", FREE, **remote)
chat = run("local-chat-completions", "/v1/chat/completions", FREE, tokenizer_backend=None, tokenized_requests=False)
print(json.dumps({"version": version("lm-eval"), "choice": choice, "free": free, "chat": chat}))
