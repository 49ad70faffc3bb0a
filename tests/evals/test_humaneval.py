"""HumanEval, and the sandbox that its programs run in: verdicts as human-eval's, and what a program can't do."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.sandbox import program
from gemcutter.evals.sandbox.program import Limits, Outcome, run_program, usual_limits
from gemcutter.evals.task import Asked, Item, Reply
from gemcutter.evals.tasks import find_mode, open_task
from gemcutter.evals.tasks.humaneval import code_of

GOLDENS = Path(__file__).parents[1] / "goldens" / "evals"
CASES = json.loads((GOLDENS / "human_eval_cases.json").read_text())
PASSED = json.loads((GOLDENS / "human_eval.json").read_text())["passed"]
RUN = Asked(options={"run": "yes", "timeout": "3"})
QUICK = 2.0  # seconds


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with made-up problems in human-eval's layout."""
    lines = "".join(json.dumps(problem) + "\n" for problem in CASES["problems"])
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


@pytest.fixture(scope="module")
def limits() -> Limits:
    """Return the limits of this system, with little time."""
    return usual_limits(QUICK)[0]


@pytest.fixture(scope="module")
def system() -> Outcome:
    """Return what this system can do."""
    return usual_limits(QUICK)[1]


def items(folder: Path, mode: str, asked: Asked = RUN) -> list[Item]:
    """Return the items of a folder."""
    task = open_task("humaneval")
    return list(task.items(Data.of("humaneval", None, str(folder)), find_mode(task, mode), asked))


def test_verdicts_are_human_evals(data: Path) -> None:
    task = open_task("humaneval")
    mode = find_mode(task, "completion")
    found = {item.id: item for item in items(data, "completion")}
    verdicts = [task.grade(found[id], mode, Reply(text=text), RUN).metrics["pass@1"] for id, text in CASES["completions"]]
    assert verdicts == [float(passed) for passed in PASSED]
    assert 0 < sum(PASSED) < len(PASSED)


def test_prompts_and_stops(data: Path) -> None:
    raw, chat = items(data, "completion")[0], items(data, "chat")[0]
    assert raw.prompt == CASES["problems"][0]["prompt"]
    [message] = chat.prompt
    assert isinstance(message, dict)
    assert message["content"].startswith("Read the following function signature and docstring, and fully implement")
    assert message["content"].endswith(CASES["problems"][0]["prompt"])
    assert find_mode(open_task("humaneval"), "completion").stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Sure:\n```python\ndef double(x: int) -> int:\n    return 2 * x\n```\nDone.", True),
        ("```\ndef helper(x):\n    return 2\n\ndef double(x):\n    return helper(x) * x\n```", True),
        ("```py\n    return 2 * x\n```", True),
        ("def double(x):\n    return 2 * x", True),
        ("```python\nprint(double(2))\n```\nand\n```python\ndef double(x):\n    return 2 * x\n```", True),
        ("```python\ndef double(x):\n    return x\n```", False),
        ("I can't.", False),
        ("", False),
    ],
)
def test_code_is_taken_out_of_chat_replies(data: Path, text: str, passes: bool) -> None:
    task = open_task("humaneval")
    item = items(data, "chat")[0]
    grade = task.grade(item, find_mode(task, "chat"), Reply(text=text), RUN)
    assert grade.metrics == {"pass@1": float(passes)}
    assert (grade.extracted is None) == (not text)


def test_the_last_whole_function_counts() -> None:
    text = "```python\ndef f():\n    return 1\n```\n```python\ndef f():\n    return 2\n```\n```python\nf()\n```"
    assert "return 2" in code_of(text, "f")
    assert "return 1" not in code_of(text, "f")


def test_nothing_runs_unless_it_is_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "run_program", lambda *_: pytest.fail("a program ran"))
    for options in ({}, {"run": "no"}):
        with pytest.raises(RequestError, match=r"runs programs that the model wrote.*--option run=yes"):
            items(data, "completion", Asked(options=options))
    with pytest.raises(RequestError, match="no option 'runs'"):
        items(data, "completion", Asked(options={"runs": "yes"}))
    with pytest.raises(RequestError, match="timeout=soon: expected seconds"):
        items(data, "completion", Asked(options={"run": "yes", "timeout": "soon"}))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1", None),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "it ended before its tests had passed"),
        ("import ctypes; ctypes.string_at(0)", "it ended before"),
        ("x = bytearray(1 << 33)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2 << 20))", "OSError: [Errno 27]"),
        ("files = [open('f', 'w') for _ in range(99)]", "OSError: [Errno 24]"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x =", "SyntaxError"),
        ('print(\'{"token": "", "error": null}\'); import os; os.write(1, b\'x\'); os._exit(0)', "it ended before"),
        ("import os; [os.write(n, b'{\"error\": null}\\n') for n in range(3, 9) if os.path.exists(f'/dev/null')]", "OSError"),
    ],
)
def test_how_programs_end(limits: Limits, source: str, told: str | None) -> None:
    error = run_program(source, limits).error
    assert error is told if told is None else (error or "").startswith(told), error


def test_an_endless_loop_ends_in_time(limits: Limits) -> None:
    started = time.monotonic()
    assert run_program("while True: pass", limits).error in ("it ran longer than 2 s", "it ended before its tests had passed")
    assert time.monotonic() - started < QUICK + program.GRACE


def test_output_without_end_is_lost(limits: Limits) -> None:
    outcome = run_program(
        "import sys\nfor _ in range(200): sys.stdout.write('x' * 100000); sys.stderr.write('x' * 100000)", limits
    )
    assert outcome.error is None


def test_a_fork_bomb_is_stopped_and_leaves_nothing(limits: Limits) -> None:
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    source = f"import os\nname = {mark!r}\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    started = time.monotonic()
    assert run_program(source, limits).error is not None
    assert time.monotonic() - started < QUICK + program.GRACE + 2
    assert not _children()


def test_what_leaves_the_group_of_processes_is_killed_too(limits: Limits) -> None:
    source = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)\n"
    )
    assert run_program(source, limits).error is None
    assert not _children()


def _children() -> list[str]:
    """Return the lines of processes that still run the sandbox's child."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(program.CHILD) in line]


def test_a_program_sees_nothing_of_whoever_runs_it(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMCUTTER_TEST_SECRET", "swordfish")
    handle = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        told = run_program("import os\nraise ValueError(sorted(os.environ), os.listdir('.'))", limits).error
        assert told == "ValueError: (['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR'], [])"
        read = f"import os\ntry: os.read({handle}, 1)\nexcept OSError as error: assert error.errno == 9\nelse: raise ValueError"
        assert run_program(read, limits).error is None
    finally:
        os.close(handle)


def test_a_program_is_cut_off_where_the_system_can(limits: Limits, system: Outcome) -> None:
    if not (system.is_isolated and system.is_read_only):
        pytest.skip("this system allows no name spaces")
    connect = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    assert "Network is unreachable" in (run_program(connect, limits).error or "")
    parent = f"import os\nassert not os.path.exists('/proc/{os.getpid()}/environ')\nassert os.getpid() == 1"
    assert run_program(parent, limits).error is None
    outside = "try: open('/tmp/gemcutter-was-here', 'w')\nexcept OSError: open('here', 'w')\nelse: raise ValueError"
    assert run_program(outside, limits).error is None
    assert not Path("/tmp/gemcutter-was-here").exists()


def test_the_folder_is_gone_afterwards(limits: Limits) -> None:
    told = run_program("import os\nopen('left', 'w').write('x')\nraise ValueError(os.getcwd())", limits).error or ""
    folder = told.removeprefix("ValueError: ")
    assert folder.startswith("/")
    assert not Path(folder).exists()


def test_time_is_the_users_to_set(limits: Limits) -> None:
    assert run_program("import time; time.sleep(0.6)", replace(limits, seconds=0.3)).error == "it ran longer than 0.3 s"
