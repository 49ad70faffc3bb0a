"""`gemcutter serve` as a process: what it prints works as pasted, signals end it, and bad options end it at once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gemcutter import native
from gemcutter.cli import main
from gemcutter.errors import RequestError
from tests.processes import descendants, runs

ROOT = Path(__file__).parents[2]
START = [sys.executable, "-m", "gemcutter.cli", "serve", "demo", "--port", "0"]


@contextmanager
def process(*more: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Start a server and give it with the lines that it prints until it serves."""
    found = subprocess.Popen([*START, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert found.stderr is not None
    lines = list[str]()
    try:
        for line in found.stderr:
            lines.append(line.strip())
            if line.startswith("python -c"):
                break
        yield found, lines
    finally:
        if found.poll() is None:
            found.kill()
        found.wait(60)
        found.stderr.close()


def url_of(lines: list[str]) -> str:
    return next(found[1] for line in lines if (found := re.search(r"serving on (\S+)", line)))


def test_what_it_prints_works_as_pasted_and_sigterm_ends_it() -> None:
    with process("--served-model-name", "lamp") as (server, lines):
        assert "8 requests at once" in lines[0]
        assert re.match(r"memory: \S+ MB of weights, \S+ MB of cache", lines[1])
        url = url_of(lines)
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "lamp"
        curl, python = (next(line for line in lines if line.startswith(word)) for word in ("curl", "python"))
        body = re.search(r"-d '(.*)'$", curl)
        assert body is not None
        answer = httpx.post(f"{url}/chat/completions", content=body[1], headers={"content-type": "application/json"}, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"]
        said = subprocess.run(
            [sys.executable, *re.findall(r"^python (-c) '(.*)'$", python)[0]], capture_output=True, text=True, check=True
        )
        assert said.stdout.strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) in (0, -signal.SIGTERM)


def test_sigterm_lets_a_reply_end() -> None:
    with process() as (server, lines):
        body = {"model": "demo", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        body |= {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{url_of(lines)}/chat/completions", json=body, timeout=60) as answer:
            found = answer.iter_lines()
            next(found)
            server.send_signal(signal.SIGTERM)
            rest = list(found)
        assert 'finish_reason":"length"' in "".join(rest)
        assert "data: [DONE]" in rest
        assert server.wait(30) in (0, -signal.SIGTERM)


def test_a_reply_that_outlives_the_grace_ends_with_an_error() -> None:
    with process("--shutdown-timeout", "0.3") as (server, lines):
        body = {"model": "demo", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        body |= {"max_tokens": 30_000, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{url_of(lines)}/chat/completions", json=body, timeout=60) as answer:
            found = answer.iter_lines()
            next(found)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in found if line]
        assert "shutting down" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.wait(30) in (0, -signal.SIGTERM)


def test_a_kill_ends_the_stream_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client sees its connection end, the port can be taken at once, and no temporary file or shared memory is left."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what a process has mapped")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with process() as (server, lines):
        port = httpx.URL(url_of(lines)).port
        body = {"model": "demo", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        body |= {"max_tokens": 30_000, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{url_of(lines)}/chat/completions", json=body, timeout=60) as answer:
            found = answer.iter_lines()
            next(found)
            assert "/dev/shm/" not in Path(f"/proc/{server.pid}/maps").read_text()  # which would outlive it
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(found)
        assert server.wait(30) == -signal.SIGKILL
        assert list(tmp_path.iterdir()) == []
    with process("--port", str(port)) as (_, again):
        assert httpx.URL(url_of(again)).port == port
        assert httpx.get(f"{url_of(again)}/models").status_code == 200


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 can't be taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--reasoning-field", "x"], "--reasoning-field: expected one of reasoning_content, reasoning, both"),
        (["--default-chat-template-kwargs", "["], "--default-chat-template-kwargs: expected a JSON object"),
        (["--default-chat-template-kwargs", "[]"], "--default-chat-template-kwargs: expected a JSON object"),
        (["--lora-modules", "name"], "--lora-modules: expected NAME=PATH"),
        (["--prefix-cache-bytes", "4X"], "--prefix-cache-bytes: expected bytes, such as 0, 200000000, 512M or 4G, found '4X'"),
        (["--bos-for-token-prompts", "maybe"], "--bos-for-token-prompts: expected one of auto, never"),
        (["--media", "sound"], "expected auto, none, or image and audio and video, found sound"),
        (["--media", "image", "--language-model-only"], "--language-model-only: the same as --media none"),
        (["--max-soft-tokens", "100"], "expected one of 70, 140"),
        (["--limit-mm-per-prompt", "smell=2"], "--limit-mm-per-prompt: expected image=N, audio=N, video=N, found 'smell'"),
        (["--limit-mm-per-prompt", "image=-1"], "--limit-mm-per-prompt: image: expected a number, 0 or more, found '-1'"),
        (["--limit-mm-per-prompt", '{"image": true}'], "--limit-mm-per-prompt: image: expected a number, 0 or more, found True"),
    ],
)
def test_bad_options_are_named(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", "--port", "0", *words]) == 2
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "media"),
    [
        ([], ("auto", "image", "audio", "video")),
        (["--media", "auto"], ("auto", "image", "audio", "video")),
        (["--media", "image,audio"], ("image", "audio")),
        (["--media", "image"], ("image",)),
        (["--media", "none"], ()),
        (["--language-model-only"], ()),
        (["--language-model-only", "--media", "none"], ()),
        (["--limit-mm-per-prompt", "image=0,audio=0,video=0"], ()),
        (["--limit-mm-per-prompt", "image=0"], ("auto", "audio", "video")),
        (["--limit-mm-per-prompt", '{"image": 3}'], ("auto", "image", "audio", "video")),
    ],
)
def test_towers_are_loaded_where_images_may_come(
    words: list[str], media: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is asked for; a server that reads text alone loads no tower."""
    asked = list[object]()

    def load_model(*_: object, **options: object) -> None:
        asked.append(options["media"])
        raise RequestError("enough")

    monkeypatch.setattr("gemcutter.cli.serve.load_model", load_model)
    assert main(["serve", "demo", "--port", "0", *words]) == 1
    assert asked == [media]


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "demo"]) == 1
    assert "pip install 'gemcutter[serve]'" in capsys.readouterr().err


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_server_whose_rank_dies_ends_its_requests_and_itself() -> None:
    with process("--tensor-parallel", "2") as (server, lines):
        (rank,) = [child for child in descendants(server.pid) if runs(child, "gemcutter.rank_process")]
        body = {"model": "demo", "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        body |= {"max_tokens": 30_000, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{url_of(lines)}/chat/completions", json=body, timeout=60) as answer:
            found = answer.iter_lines()
            next(found)
            os.kill(rank, signal.SIGKILL)
            rest = [line for line in found if line]
        assert "rank 1" in "".join(rest[-2:])
        assert server.wait(30) == 1
        assert not Path(f"/proc/{rank}").exists()
