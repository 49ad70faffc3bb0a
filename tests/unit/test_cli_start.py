"""What a command line reads before it does anything: its own command's modules, and torch's libraries beside them."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest

from gemcutter.cli import terminal, torch_libraries
from gemcutter.cli.app import COMMANDS
from gemcutter.cli.torch_libraries import RUNNING, load_ahead


def ends_well(code: str) -> bool:
    """Return whether a process of its own runs this code to its end."""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_no_other_commands_are_imported(command: str) -> None:
    others = {f"gemcutter.cli.{name.replace('-', '_')}" for name in COMMANDS} - {f"gemcutter.cli.{command}"}
    code = f"import sys; from gemcutter.cli import main; main([{command!r}, '--help']); assert not {others} & set(sys.modules)"
    assert ends_well(code)


def test_libraries_are_loaded_ahead_and_torch_takes_them_over() -> None:
    assert ends_well(
        "import sys, threading\n"
        "from gemcutter.cli.torch_libraries import load_ahead\n"
        "load_ahead(['run', 'demo'])\n"
        "[thread] = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]\n"
        "thread.join()\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'libtorch_cpu.so' in open('/proc/self/maps').read()\n"
        "import torch\n"
        "assert torch.ones(8, 8).matmul(torch.ones(8, 8)).sum() == 512\n"
    )


def test_libraries_are_loaded_for_commands_that_run_a_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    monkeypatch.setattr(torch_libraries, "_load", began.set)
    monkeypatch.delitem(sys.modules, "torch")
    for words in ([], ["doctor", "demo"], ["run", "--help"], ["--version"]):
        load_ahead(words)
    assert not began.wait(0.1)
    load_ahead(["run", "demo", "hi"])
    assert began.wait(10)
    assert set(RUNNING) <= set(COMMANDS)


def test_a_command_that_ends_while_libraries_are_loading_ends_as_always() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gemcutter", "run", "/absent", "hi"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("patience_s", "is_terminal"), [(-1.0, True), (-1.0, False), (60.0, True)])
def test_a_bar_is_drawn_on_a_terminal_once_work_lasts(
    patience_s: float, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(terminal, "PATIENCE_S", patience_s)
    monkeypatch.setenv("TERM", "xterm")
    terminal.aside.cache_clear()
    terminal.set_volume(terminal.Volume.NORMAL)
    try:
        with terminal.progress("loading demo") as advance:
            advance(1, 4)
            advance(4, 4)
    finally:
        terminal.aside.cache_clear()
    is_drawn = is_terminal and patience_s < 0
    assert ("loading demo" in shown.getvalue()) == is_drawn
    assert bool(shown.getvalue()) == is_drawn
