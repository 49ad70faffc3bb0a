"""Four ways to one number: our runner, lm-eval with our class, lm-eval over HTTP, and transformers agree in float32.

Every log-likelihood within 1e-3 and every choice, for contexts without examples and with, raw and through the chat template;
rolling likelihoods and greedy replies too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import gemcutter
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.records import Log, read
from gemcutter.evals.run import How, items_of, run
from gemcutter.evals.task import Asked
from gemcutter.evals.tasks import find_mode, open_task
from gemcutter.server.options import ServerOptions
from tests.server.conftest import running

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from gemcutter.evals.lm_eval_model import GemcutterLM, options_of

CLOSE = 1e-3
ANIMALS = ("cow", "heron", "mole", "carp", "otter", "wasp", "goat", "hare")
OTHERS = ("gait", "xylem", "parlour", "hymn", "barley", "anvil", "treaty", "sonnet", "glove")
LETTERS = "ABCD"


def write_questions(folder: Path) -> Path:
    """Write a made-up subject in Hendrycks' layout: 5 examples, 12 questions."""
    for split, count in (("dev", 5), ("test", 12)):
        file = folder / split / f"word_kinds_{split}.csv"
        file.parent.mkdir(parents=True)
        lines = list[str]()
        for number in range(count):
            choices = [OTHERS[(number * 2 + place * 3) % len(OTHERS)] for place in range(4)]
            right = number * 3 % 4
            choices[right] = ANIMALS[number % len(ANIMALS)]
            lines.append(",".join((f'"Which of these is an animal, in list {number}?"', *choices, LETTERS[right])))
        file.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def ours() -> Iterator[GemcutterLM]:
    found = GemcutterLM(model="demo", dtype="float32", batch_size=4, context=1024)
    yield found
    found.model.close()


@pytest.fixture(scope="module")
def over_http(ours: GemcutterLM) -> Iterator[Any]:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with running(ours.model, ServerOptions(names=("demo",))) as server:
        yield LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="demo",
            tokenizer=str(DEMO_FOLDER),
            tokenizer_backend="huggingface",
            batch_size=4,
        )


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()


def items(folder: Path, mode: str, shots: int) -> tuple[Any, Any, Any, Asked]:
    asked = Asked(shots=shots)
    task = open_task("mmlu")
    found = find_mode(task, mode)
    return task, found, items_of(task, Data.of("mmlu", None, str(folder)), found, asked), asked


def expected(oracle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """Return the log-likelihoods that transformers gives, each pair by itself."""
    found = list[tuple[float, bool]]()
    for context, continuation in pairs:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logprobs = oracle(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        rows = range(len(continuation))
        greedy = bool((logprobs.argmax(-1) == ids[0, len(context) :]).all())
        found.append((math.fsum(float(logprobs[row, continuation[row]]) for row in rows), greedy))
    return found


def asked_of(pairs: Sequence[tuple[str, Any]], kind: str) -> list[Any]:
    return [Instance(kind, {}, pair, place) for place, pair in enumerate(pairs)]


def predictions(scores: Sequence[float]) -> str:
    four = [scores[first : first + 4] for first in range(0, len(scores), 4)]
    return "".join(LETTERS[max(range(4), key=each.__getitem__)] for each in four)


def assert_close(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    assert [each[1] for each in found] == [each[1] for each in wanted]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in wanted], abs=CLOSE)
    assert predictions([each[0] for each in found]) == predictions([each[0] for each in wanted])


@pytest.mark.parametrize("shots", [0, 5])
def test_four_ways_agree_on_letters(tmp_path: Path, ours: GemcutterLM, over_http: Any, oracle: Any, shots: int) -> None:
    task, mode, found, asked = items(write_questions(tmp_path / "data"), "ll", shots)
    pairs = [(item.prompt, f" {choice}") for item in found for choice in item.choices]
    direct = ours.loglikelihood(asked_of(pairs, "loglikelihood"), disable_tqdm=True)
    wanted = expected(oracle, [_ids(ours, *pair) for pair in pairs])
    assert_close(direct, wanted)
    assert_close(over_http.loglikelihood(asked_of(pairs, "loglikelihood"), disable_tqdm=True), wanted)
    with Log(tmp_path / "run.jsonl", {"task": "mmlu"}) as log:
        run(ours.model, task, mode, found, asked, How(), log, lambda done, total: None)
    records = list(read(tmp_path / "run.jsonl").records.values())
    assert sorted(record.id for record in records) == sorted(item.id for item in found)
    by_id = {record.id: record for record in records}
    own = [logprob for item in found for logprob in by_id[item.id].logprobs]
    assert own == pytest.approx([each[0] for each in wanted], abs=CLOSE)
    assert "".join(str(by_id[item.id].extracted) for item in found) == predictions([each[0] for each in wanted])


def _ids(ours: GemcutterLM, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
    pair = ours.model.encode_pair(context, continuation)
    return pair.context, pair.continuation


def test_three_ways_agree_on_texts_behind_the_template(ours: GemcutterLM, over_http: Any, oracle: Any) -> None:
    """Continuations of several tokens, the context's end moved to them, one BOS whoever brings it."""
    asked = [f"Name an animal, number {number}." for number in range(6)]
    contexts = [ours.apply_chat_template([{"role": "user", "content": text}]) for text in asked]
    pairs = [(context, text) for context in contexts for text in ("A cow.", "the otter of the river", "\n\nx", "B")]
    wanted = expected(oracle, [_ids(ours, *pair) for pair in pairs])
    assert_close(ours.loglikelihood(asked_of(pairs, "loglikelihood"), disable_tqdm=True), wanted)
    assert_close(over_http.loglikelihood(asked_of(pairs, "loglikelihood"), disable_tqdm=True), wanted)
    assert contexts[0].startswith("<bos>") == (ours.tok_encode(contexts[0])[1] != ours.eot_token_id)


def test_an_empty_context_is_bos(ours: GemcutterLM, oracle: Any) -> None:
    (found,) = ours.loglikelihood(asked_of([("", "The lamp of the house")], "loglikelihood"), disable_tqdm=True)
    ids = ours.tok_encode("The lamp of the house")
    assert found[0] == pytest.approx(expected(oracle, [(ids[:1], ids[1:])])[0][0], abs=CLOSE)


def test_rolling_likelihoods_count_every_token_once(ours: GemcutterLM, oracle: Any) -> None:
    """In windows of the context's length, as lm-eval defines them, the first of which begins with one BOS."""
    texts = ["The lamp stood in the window.", "In the beginning God created the heaven and the earth. " * 110]
    found = ours.loglikelihood_rolling(asked_of([(text,) for text in texts], "loglikelihood_rolling"), disable_tqdm=True)
    for text, logprob in zip(texts, found, strict=True):
        ids, size = ours.tok_encode(text)[1:], ours.max_length
        assert (len(ids) > size) == (text is texts[1])
        pairs = [([ours.eot_token_id], ids[:size])]
        for start in range(size, len(ids), size):
            stop = min(start + size, len(ids))
            pairs.append((ids[stop - size - 1 : start], ids[start:stop]))
        wanted = math.fsum(each[0] for each in expected(oracle, pairs))
        assert logprob == pytest.approx(wanted, abs=CLOSE * len(pairs), rel=1e-5)


def test_greedy_replies_agree(ours: GemcutterLM, over_http: Any, oracle: Any) -> None:
    contexts = ["The lamp stood", "Question: which animal?\nAnswer:", "In the beginning"]
    asked = {"until": ["\n\n", "."], "max_gen_toks": 12, "do_sample": False}
    found = ours.generate_until(asked_of([(text, asked) for text in contexts], "generate_until"), disable_tqdm=True)
    other = over_http.generate_until(asked_of([(text, dict(asked)) for text in contexts], "generate_until"), disable_tqdm=True)
    assert found == other
    for context, reply in zip(contexts, found, strict=True):
        ids = torch.tensor([ours.tok_encode(context)])
        tokens = oracle.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        text = ours.model.tokenizer.decode(tokens)
        assert reply == text.split("\n\n")[0].split(".")[0]


def test_a_whole_task_runs_through_lm_evals_own_evaluator(tmp_path: Path, ours: GemcutterLM) -> None:
    """A task of a local file: lm-eval's results are what our scores make of it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Is {word} an animal?", "answer": word in ANIMALS} for word in (*ANIMALS[:4], *OTHERS[:4])]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"answer": str(int(row["answer"]))}) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(
        f"task: animals\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["no", "yes"]\n'
        'doc_to_target: "{{answer|int}}"\nmetric_list:\n  - metric: acc\n'
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=ours, tasks=["animals"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert found is not None
    scores = ours.model.score_all([(row["question"], f" {word}") for row in rows for word in ("no", "yes")])
    pairs = [scores[first : first + 2] for first in range(0, len(scores), 2)]
    right = [int(no.logprob < yes.logprob) == int(row["answer"]) for row, (no, yes) in zip(rows, pairs, strict=True)]
    assert found["results"]["animals"]["acc,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"model": "demo", "modle": 1}, "modle: not known"), ({}, "which model"), ({"model": "demo", "dtype": "float12"}, "dtype")],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(gemcutter.GemcutterError, match=words):
        options_of(arguments)


def test_a_context_that_is_too_long_keeps_its_bos(ours: GemcutterLM, caplog: pytest.LogCaptureFixture) -> None:
    context = list(range(300, 300 + ours.max_length + 40))
    context[0] = ours.eot_token_id
    fitted = ours._fitted(context, [7, 8, 9])
    assert len(fitted) + 3 - 1 == ours.max_length
    assert fitted[0] == ours.eot_token_id
    assert list(fitted[1:]) == context[-(len(fitted) - 1) :]
    assert "loses" in caplog.text
    with pytest.raises(RequestError, match="does not fit"):
        ours._fitted(context, [7] * ours.max_length)
