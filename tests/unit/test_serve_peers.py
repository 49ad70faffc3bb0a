"""The comparison of servers: the same prompts for all, rounds in turned order, ratios of rounds, and the README's table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import serve_peers
from bench.ratios import README
from tests.scripted_server import DONE, ScriptedServer, Sent, scripted, usage

LOAD = [
    *("--model", "demo", "--only-urls", "--groups", "1", "2", "--requests", "4", "--system", "40", "--question", "20"),
    *("--output", "3", "-r", "2", "--concurrency", "2"),
]


def words(gap_s: float) -> list[Sent]:
    texts = [Sent(gap_s, {"choices": [{"text": " a"}]}) for _ in range(3)]
    end = Sent(0, {"choices": [{"text": "", "finish_reason": "length"}]})
    return [*texts, end, Sent(0, usage(60, 3, prompt_tokens_details={"cached_tokens": 40})), Sent(0, DONE)]


@pytest.fixture
def servers() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted(lambda body: words(0.005)) as quick, scripted(lambda body: words(0.06)) as slow:
        yield quick, slow


def test_servers_get_the_same_prompts_in_turned_order(
    servers: tuple[ScriptedServer, ScriptedServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, slow = servers
    urls = ["--url", f"gemcutter={quick.url}", "--url", f"other={slow.url}/v1"]
    assert serve_peers.main([*LOAD, *urls, "--results", str(tmp_path)]) == 0
    prompts = [sorted(each.body["prompt"] for each in server.asked) for server in servers]
    assert prompts[0] == prompts[1]
    assert {len(prompt) for prompt in prompts[0]} == {60}
    assert len(prompts[0]) == 2 * (4 + 1 + 4 + 1)  # rounds of a warm-up and four requests for each number of groups
    assert quick.asked[0].came_s < slow.asked[0].came_s
    assert slow.asked[10].came_s < quick.asked[10].came_s  # the second round begins with the other one
    assert quick.most_at_once == 2
    found = serve_peers.newest(tmp_path)
    assert found is not None
    assert [(row["groups"], row["server"], len(row["rounds"])) for row in found["rows"]] == [
        (1, "gemcutter", 2),
        (1, "other", 2),
        (2, "gemcutter", 2),
        (2, "other", 2),
    ]
    assert {each["cached_tokens"] for row in found["rows"] for each in row["rounds"]} == {4 * 40}
    for row in found["rows"]:
        for each in row["rounds"]:
            assert each["output_throughput"] == pytest.approx(4 * 3 / each["duration"])
            assert each["total_throughput"] == pytest.approx(4 * 63 / each["duration"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| 1 | gemcutter |")


@pytest.mark.parametrize(("answer", "said"), [((500, "broken"), "broken"), (words(0)[1:], "replies are not 3 tokens long")])
def test_a_server_that_fails_leaves_no_result(answer: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(answer, list):
        answer = [*answer[:-2], Sent(0, usage(60, 2)), Sent(0, DONE)]
    with scripted(lambda body: answer) as server:
        assert serve_peers.main([*LOAD, "--url", f"x={server.url}", "--results", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def row(server: str, groups: int, speeds: list[float], cached: int | None = 7) -> dict[str, Any]:
    rounds = [
        {"requests": 4, "cached_tokens": cached, "duration": 1.0, **dict.fromkeys(serve_peers.FIGURES, speed)} for speed in speeds
    ]
    return {"server": server, "groups": groups, "rounds": rounds, **serve_peers.medians(rounds)}


def test_ratios_are_medians_of_the_rounds_own() -> None:
    ours, theirs = row("gemcutter", 1, [10.0, 90.0, 30.0]), row("llama.cpp", 1, [5.0, 30.0, 5.0], None)
    assert serve_peers.ratio(ours, theirs, "total_throughput") == 3  # of 2, 3 and 6, while the medians' own ratio is 6
    lines = serve_peers.table({"rows": [ours, theirs]}).splitlines()
    assert lines[2] == "| 1 | gemcutter | 30.0 | 30.0 | 0.03 s | 0.03 s | 30 ms | 7 |"
    assert lines[3] == "| 1 | llama.cpp | 5.0 (3x) | 5.0 (3x) | 0.01 s | 0.01 s | 5 ms | - |"


def test_the_block_says_what_was_measured() -> None:
    rows = [row("gemcutter", 1, [40.0]), row("llama.cpp", 1, [10.0])]
    machine = {"cpu": "AMD EPYC", "cores": 2, "features": ["avx2"]}
    load = {"system": 500, "question": 400, "output": 80, "concurrency": 8, "rate": "inf"}
    run = {"date": "2026-01-05", "machine": machine, "model": "E2B, q4_0", "threads": 2, "rounds": 1, "load": load, "rows": rows}
    made = serve_peers.block(run)
    said = " ".join(made.partition("\n\n")[0].split())
    assert "on AMD EPYC, 2 cores (avx2): E2B, q4_0, 2 threads" in said
    assert (
        "500 tokens that a group shares and 400 of their own, replies 80 tokens; requests (4 in 1 groups) come all at once"
        in said
    )
    assert "| 1 | llama.cpp | 10.0 (4x) | 10.0 (4x) |" in made
    assert max(len(line) for line in made.splitlines() if not line.startswith("|")) <= 120


def test_llama_cpp_is_compared_where_its_program_is_named(tmp_path: Path) -> None:
    options = serve_peers.parse(["--llama-server", "/opt/llama-server", "--url", "vLLM=http://h:1/v1"])
    peers = serve_peers.list_peers(options, tmp_path / "m.gguf")
    assert [(peer.name, peer.url) for peer in peers] == [("gemcutter", ""), ("llama.cpp", ""), ("vLLM", "http://h:1")]
    both = [peer.server.command for peer in peers if peer.server]
    assert all(str(tmp_path / "m.gguf") in command for command in both)


def test_the_readme_shows_the_newest_result() -> None:
    found = serve_peers.newest()
    text = README.read_text()
    shown = text.partition(serve_peers.BEGIN)[2].partition(serve_peers.END)[0].strip()
    assert shown == ("" if found is None else serve_peers.block(found))
