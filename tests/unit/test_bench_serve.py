"""`bench-serve` against a server whose streams are written down: the client, the load, what is printed, and what fails."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.cli.bench_serve import PRESETS
from tests.markdown import ENVIRONMENT, ROOT
from tests.scripted_server import DONE, ScriptedServer, Sent, chat, scripted, steady, usage

LINES = [{"prompt": f"Question {number}?", "output_len": 4} for number in range(6)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


@pytest.fixture
def asked_for(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Return a function that runs the command with --json and gives its exit code and the object."""

    def run(server: ScriptedServer, *words: str) -> tuple[int, Any]:
        code = main(["bench-serve", server.url, "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    return run


def jsonl(path: Path, *words: str) -> list[str]:
    return ["--dataset-name", "jsonl", "--dataset-path", str(path), *words]


# ---- times ----


def test_times_are_those_of_the_stream(questions: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    with scripted(lambda body: steady(6, 0.06, first_s=0.15)) as server:
        code, found = asked_for(server, *jsonl(questions, "--max-concurrency", "1", "--output-details"))
    assert code == 0
    ours, theirs = found["sglang"], found["vllm"]
    replies = server.asked[1:]  # the first is the warm-up
    sent = [each.sent_s for each in replies]  # a role, 6 texts, the end, usage, [DONE]
    errors = [ttft - (times[1] - each.came_s) for ttft, times, each in zip(ours["ttfts"], sent, replies, strict=True)]
    assert statistics.median(map(abs, errors)) < 0.015
    gaps = [[later - earlier for earlier, later in pairwise(times[1:7])] for times in sent]
    assert [len(each) for each in ours["itls"]] == [5] * len(LINES)
    differences = [abs(a - b) for mine, real in zip(ours["itls"], gaps, strict=True) for a, b in zip(mine, real, strict=True)]
    assert statistics.median(differences) < 0.015
    assert ours["median_tpot_ms"] / 1000 == pytest.approx(statistics.median([(t[9] - t[1]) / 5 for t in sent]), abs=0.015)
    assert theirs["median_ttft_ms"] < 100 < ours["median_ttft_ms"]  # the role comes at once, and is no token but to vLLM
    assert [len(each) for each in theirs["itls"]] == [7] * len(LINES)
    assert (ours["completed"], ours["total_output_tokens"], ours["max_concurrent_requests"]) == (6, 36, 1)
    assert found["load"]["other_length_than_asked"] == 6
    assert found["load"]["client_queue_ms"]["max"] > 1000 * 0.9 * 5 * 0.4  # the last one waited for five others


def test_requests_are_sent_when_they_are_due_not_when_others_are_done(
    questions: Path, asked_for: Callable[..., tuple[int, Any]]
) -> None:
    words = jsonl(questions, "--request-rate", "20", "--burstiness", "inf", "--warmup-requests", "0")
    with scripted(lambda body: steady(2, 0.4, first_s=0.4)) as server:
        _, found = asked_for(server, *words)
    came = [each.came_s - server.asked[0].came_s for each in server.asked]
    assert came == pytest.approx([place / 20 for place in range(6)], abs=0.2)
    assert server.most_at_once > 4
    assert found["load"]["offered_requests_per_s"] == 20
    assert found["sglang"]["duration"] < 6 * 0.8


def test_the_limit_on_concurrency_holds(questions: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    with scripted(lambda body: steady(2, 0.05, first_s=0.05)) as server:
        _, found = asked_for(server, *jsonl(questions, "--max-concurrency", "2"))
    assert server.most_at_once == 2
    assert found["sglang"]["max_concurrency"] == found["vllm"]["max_concurrency"] == 2


# ---- what is sent ----


def test_bodies_are_what_servers_expect(questions: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    more = ("--api-key", "secret", "--extra-request-body", '{"top_k": 3}', "--num-prompts", "1", "--warmup-requests", "0")
    with scripted(lambda body: steady(4, 0)) as server:
        asked_for(server, *jsonl(questions, *more))
        asked_for(server, *jsonl(questions, *more, "--api", "completions", "--no-ignore-eos", "--model", "other"))
    first, second = server.asked
    assert (first.path, second.path) == ("/v1/chat/completions", "/v1/completions")
    assert first.key == second.key == "Bearer secret"
    assert first.body == {
        "model": "scripted",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Question 0?"}],
        "max_completion_tokens": 4,
        "max_tokens": 4,
        "top_k": 3,
    }
    assert second.body["prompt"] == "Question 0?"
    assert second.body["model"] == "other"
    assert "ignore_eos" not in second.body


def test_a_conversation_goes_on_from_real_replies(tmp_path: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    path = tmp_path / "talks.jsonl"
    system = {"role": "system", "content": "Be brief."}
    talks = [{"turns": ["One?", "Two?", "Three?"]}, {"messages": [system, {"role": "user", "content": "Four?"}]}]
    path.write_text("\n".join(map(json.dumps, talks)))

    def answer(body: dict[str, Any]) -> list[Sent]:
        number = len(body["messages"])
        texts = [Sent(0, chat(reasoning="hm")), Sent(0, chat(f"reply {number}")), Sent(0, chat(finish="stop"))]
        return [*texts, Sent(0, usage(10, 3)), Sent(0, DONE)]

    with scripted(answer) as server:
        code, found = asked_for(server, *jsonl(path, "--warmup-requests", "0"))
    assert code == 0
    talk = [each.body["messages"] for each in server.asked if each.body["messages"][0]["content"] == "One?"]
    assert [[message["content"] for message in turn] for turn in talk] == [
        ["One?"],
        ["One?", "reply 1", "Two?"],
        ["One?", "reply 1", "Two?", "reply 3", "Three?"],
    ]
    assert any(each.body["messages"] == talks[1]["messages"] for each in server.asked)
    assert found["sglang"]["completed"] == 4
    assert len(found["load"]["ttft_by_turn_ms"]) == 3


def test_a_conversation_that_fails_is_not_gone_on_with(
    tmp_path: Path, asked_for: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"turns": ["One?", "Two?", "Three?"]}))
    with scripted(lambda body: steady(2, 0) if len(body["messages"]) == 1 else (500, "no more")) as server:
        code = main(["bench-serve", server.url, *jsonl(path)])
    found = capsys.readouterr()
    assert code == 1
    assert "1 x status 500: no more" in found.err
    assert "1 turns of conversations were not sent" in found.err
    assert "1 of 3 requests" in found.out


def test_the_cache_is_emptied_by_either_name(questions: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    for path in ("/flush_cache", "/reset_prefix_cache"):
        with scripted(lambda body: steady(4, 0)) as server:
            server.pages[path] = "{}"
            assert asked_for(server, *jsonl(questions, "--flush-cache"))[0] == 0
        assert server.posts[-1] == path
    with scripted(lambda body: steady(4, 0)) as server:
        assert main(["bench-serve", server.url, *jsonl(questions, "--flush-cache")]) == 1


def test_the_servers_own_counts_are_read(questions: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    with scripted(lambda body: steady(4, 0)) as server:
        server.pages["/server_info"] = '{"internal_states": [{"avg_spec_accept_length": 2.5}]}'
        server.pages["/metrics"] = "vllm:prefix_cache_queries_total 5\nvllm:prefix_cache_hits_total 3\n"
        _, found = asked_for(server, *jsonl(questions))
    assert found["sglang"]["accept_length"] == 2.5
    assert (found["load"]["prefix_cache_queries"], found["load"]["prefix_cache_hits"]) == (0, 0)  # they did not grow


# ---- failures ----


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ((503, '{"error": {"message": "busy"}}'), 'status 503: {"error": {"message": "busy"}}'),
        ([Sent(0, chat("a")), Sent(0, {"error": {"message": "boom"}}), Sent(0, DONE)], "boom"),
        ([Sent(0, chat("a")), Sent(0, None)], "RemoteProtocolError"),
        ([Sent(0, chat("a"))], "ended without a finish_reason"),
        ([Sent(0, "{")], "no JSON"),
    ],
    ids=["status", "error in the stream", "cut off", "no end", "no JSON"],
)
def test_a_failed_request_is_counted_and_fails_the_command(
    bad: Any, said: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return bad if body["messages"][0]["content"] == "Question 3?" else steady(4, 0.01)

    path = tmp_path / "results.jsonl"
    with scripted(answer) as server:
        code = main(["bench-serve", server.url, *jsonl(questions, "--output-file", str(path), "--output-format", "vllm")])
    found = capsys.readouterr()
    assert code == 1
    assert "1 of 6 requests failed" in found.err
    assert said in found.err
    assert "5 of 6 requests" in found.out
    written = json.loads(path.read_text())
    assert (written["completed"], written["failed"], written["total_output_tokens"]) == (5, 1, 20)


def test_a_warm_up_that_fails_ends_it(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(lambda body: (400, "unknown field")) as server:
        assert main(["bench-serve", server.url, *jsonl(questions)]) == 1
    assert "the warm-up request" in (said := capsys.readouterr().err)
    assert "status 400: unknown field" in said
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(lambda body: steady(4, 0)) as server:
        pass
    assert main(["bench-serve", server.url, *jsonl(questions)]) == 1
    assert f"{server.url} does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--request-rate", "0"], "--request-rate: expected requests a second"),
        (["--request-rate", "fast"], "--request-rate: expected requests a second"),
        (["--dataset-name", "gsm"], "--dataset-name: expected one of random"),
        (["--dataset-name", "random"], "give --tokenizer"),
        (["--tokenizer", "google/gemma-4-E2B-it"], "--tokenizer: expected a folder or file on this machine"),
        (["--dataset-name", "jsonl"], "needs --dataset-path"),
        (["--api", "responses"], "--api: expected chat or completions"),
        (["--burstiness", "0"], "--burstiness: expected a number above 0"),
        (["--extra-request-body", "[]"], "--extra-request-body: expected a JSON object"),
        (["--goodput", "itl:5"], "--goodput: expected limits in ms"),
        (["--output-format", "csv"], "--output-format: expected one of sglang, vllm, both"),
        (["--metric-percentiles", "101"], "--metric-percentiles: expected numbers up to 100"),
        (["--preset", "6k"], "--preset: expected one of 5k+5k+800, 500+500+80"),
        (["--dataset-name", "gsp", "--tokenizer", "demo", "--num-prompts", "9"], "is not 8 groups of 1"),
        (["--dataset-name", "image", "--tokenizer", "demo", "--image-resolution", "5"], "--image-resolution: expected width"),
        (["--dataset-name", "image", "--tokenizer", "demo", "--image-format", "bmp"], "--image-format: expected jpeg or png"),
    ],
)
def test_bad_options_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(lambda body: steady(4, 0)) as server:
        assert main(["bench-serve", server.url, *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert server.asked == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokenize-prompt"], "--tokenize-prompt: token ids go to --api completions"),
        (["--dataset-name", "conversations", "--api", "completions"], "--api completions takes one prompt"),
        (["--dataset-name", "image", "--api", "completions"], "--api completions takes one prompt"),
        (["--plot", "x.txt"], "--plot: expected a file that ends in one of"),
    ],
)
def test_what_an_api_cannot_carry_is_told_before_anything_is_sent(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--tokenizer", "demo", "--num-prompts", "2", "--random-input-len", "8", "--random-output-len", "4"]
    with scripted(lambda body: steady(4, 0)) as server:
        assert main(["bench-serve", server.url, *small, *words]) == 1
    assert said in capsys.readouterr().err
    assert server.asked == []


def test_an_address_without_a_scheme_is_refused(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-serve", "localhost:8000", *jsonl(questions)]) == 1
    assert "URL: expected the address of a server" in capsys.readouterr().err


# ---- what is told ----


def test_a_sweep_prints_bars_writes_a_line_a_rate_and_draws(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, picture = tmp_path / "results.jsonl", tmp_path / "latency.svg"
    words = ("--request-rate", "10,40", "--output-file", str(results), "--plot", str(picture), "--goodput", "ttft:5000")
    with scripted(lambda body: steady(4, 0.02, first_s=0.02)) as server:
        assert main(["bench-serve", server.url, *jsonl(questions, *words)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("6 of 6 requests") == 2
    assert "10 offered" in shown
    assert "goodput" in shown
    assert "█" in shown
    assert "offered   served" in shown
    assert [json.loads(line)["vllm"]["request_rate"] for line in results.read_text().splitlines()] == [10, 40]
    assert "requests served per second" in picture.read_text() or "<svg" in picture.read_text()


def test_replies_without_usage_are_noted(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [Sent(0, chat("a")), Sent(0, chat("b", finish="stop")), Sent(0, DONE)]
    with scripted(lambda body: events) as server:
        assert main(["bench-serve", server.url, *jsonl(questions)]) == 0
    assert "6 replies tell no usage" in capsys.readouterr().out


def test_a_tokenizer_alone_is_enough_and_a_gguf_file_has_one(tmp_path: Path, asked_for: Callable[..., tuple[int, Any]]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO_FOLDER / "tokenizer.json").read_bytes())
    gguf = ROOT / "tests" / "goldens" / "models" / "tiny-e-Q4_K_M.gguf"
    for model in (tmp_path, gguf):
        words = ["--tokenizer", str(model), "--num-prompts", "1", "--random-input-len", "30", "--random-output-len", "4"]
        with scripted(lambda body: steady(4, 0)) as server:
            code, found = asked_for(server, *words)
        assert (code, found["sglang"]["total_input_tokens"]) == (0, 30)


def test_images_are_sent_as_data(asked_for: Callable[..., tuple[int, Any]]) -> None:
    words = "--dataset-name image --tokenizer demo --num-prompts 2 --image-count 2 --image-resolution 24x16 --image-format png"
    more = ["--random-input-len", "9", "--random-output-len", "4", "--warmup-requests", "0"]
    with scripted(lambda body: steady(4, 0)) as server:
        asked_for(server, *words.split(), *more)
    contents = [each.body["messages"][0]["content"] for each in server.asked]
    assert [[part["type"] for part in content] for content in contents] == [["image_url", "image_url", "text"]] * 2
    urls = [part["image_url"]["url"] for content in contents for part in content[:2]]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert len(set(urls)) == 4


def test_presets_are_shared_prefixes_of_their_lengths(asked_for: Callable[..., tuple[int, Any]]) -> None:
    words = [
        "--preset",
        "500+500+80",
        "--tokenizer",
        "demo",
        "--gsp-num-groups",
        "1",
        "--num-prompts",
        "2",
        "--request-rate",
        "50",
    ]
    with scripted(lambda body: steady(80, 0)) as server:
        _, found = asked_for(server, *words)
    first, second = (each.body["messages"][0]["content"] for each in server.asked[1:])
    beginning = first.split("\n\n")[0]
    assert second.startswith(beginning + "\n\n")
    assert found["sglang"]["total_input_tokens"] == 2 * (500 + 500)
    assert found["sglang"]["dataset_name"] == "generated-shared-prefix"
    assert server.asked[1].body["max_tokens"] == 80
    assert PRESETS["5k+5k+800"] == (5000, 5000, 800)


def test_a_client_needs_no_torch(questions: Path) -> None:
    with scripted(lambda body: steady(4, 0)) as server:
        words = ["bench-serve", server.url, "--tokenizer", "demo", *jsonl(questions)]
        code = f"import sys; from gemcutter.cli import main; code = main({words!r}); sys.exit(code or 'torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "6 of 6 requests" in done.stdout
