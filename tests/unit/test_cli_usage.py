"""The command line as a whole: help, versions, bad usage, errors, exit codes, and what is never imported."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import gemcutter
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import failure, main, run
from gemcutter.cli.app import make_app
from gemcutter.cli.loading import load_model
from gemcutter.cli.options import Choosing, Loading
from gemcutter.cli.terminal import Volume, note, remark, set_volume, spell_left
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions

CLI = [sys.executable, "-m", "gemcutter.cli"]
COMMANDS = ("run", "chat", "inspect", "plan", "models", "score", "verify", "bench", "bench-serve", "tiny", "cache")
LOADERS = {"run": ["demo", "hi"], "chat": ["demo"], "score": ["demo", os.devnull], "verify": ["demo"]}
LOADERS["serve"] = ["demo", "--port", "0"]
LOADERS["eval"] = ["demo", "--task", "copy/chat"]
# One value for every option of loading, none of them the default.
LOADING: dict[str, Any] = {
    "dtype": "float32",
    "device": "cuda:1",
    "kernels": "triton",
    "activations": "bf16",
    "threads": 3,
    "ignore": ["a.*", "b.*"],
    "adapter": "folder",
    "quant": "q8",
    "repack_cache": True,
    "ple": "host",
    "chat_template": "own",
    "generation_config": "none",
    "mmproj": "projector",
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
}


def test_help_names_every_command_and_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert "gemcutter run demo" in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    assert f"  gemcutter {command} " in shown or f"| gemcutter {command} " in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "-V"):
        assert main([option]) == 0
        assert capsys.readouterr().out == f"gemcutter {gemcutter.__version__}\n"


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["run"]):
        assert main(["help", *words]) == 0
        shown = capsys.readouterr().out
        assert main([*words, "--help"]) == 0
        assert capsys.readouterr().out == shown
    assert main(["help", "rnu"]) == 2


def test_a_shell_can_complete_commands_and_options() -> None:
    script = subprocess.run([*CLI, "--show-completion", "bash"], capture_output=True, text=True, check=False)
    if script.returncode:  # typer finds out by itself which shell it is
        script = subprocess.run([*CLI, "--show-completion"], capture_output=True, text=True, check=False)
    for line, expected in (("gemcutter sc", "score"), ("gemcutter run demo --temp", "--temperature")):
        asked = {"_GEMCUTTER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        done = subprocess.run(CLI, env=os.environ | asked, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, expected)


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "doctor", "convert", "score", "verify", "bench", "tiny", "cache"])
def test_every_command_can_be_quiet_or_verbose(command: str) -> None:
    taken = parameters_of(command)
    assert {"-q", "--quiet"} <= {*taken["quiet"].opts}
    assert {"-v", "--verbose"} <= {*taken["verbose"].opts}


def test_notes_are_left_out_where_that_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for volume, shown in ((Volume.QUIET, ""), (Volume.NORMAL, "note: a\n"), (Volume.VERBOSE, "note: a\nb\n")):
        set_volume(volume)
        note("a")
        remark("b")
        assert capsys.readouterr().err == shown
    set_volume(Volume.NORMAL)


def test_a_note_is_called_so_once() -> None:
    """`note` puts the word before the text itself, for every command alike."""
    for path in Path(str(import_module("gemcutter.cli").__file__)).parent.glob("*.py"):
        assert not re.search(r"""\bnote\(f?["']note""", path.read_text()), path


def test_warnings_of_python_are_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn("it is not kept", stacklevel=1)
        raise GemcutterError("that is enough")

    monkeypatch.setattr(run, "load_model", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["run", "demo", "hi"]) == 1
    assert capsys.readouterr().err == "note: it is not kept\nerror: that is enough\n"


def test_work_says_how_long_it_will_still_take() -> None:
    assert [spell_left(10.0, *counts) for counts in ((0, 4), (1, 4), (4, 4))] == ["", "0:30 left", "0:00 left"]
    assert spell_left(100.0, 1, 2) == "1:40 left"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "'rnu'"),
        (["run"], "MODEL"),
        (["run", "demo", "hi", "--temprature", "1"], "--temperature"),
        (["run", "demo", "hi", "-n", "many"], "--max-tokens"),
        (["run", "demo", "hi", "-n", "-1"], "--max-tokens"),
        (["run", "demo", "hi", "--dtype", "float16"], "use bfloat16 or float32"),
        (["run", "demo", "hi", "--dtype", "int8"], "expected float32 or bfloat16"),
        (["run", "demo", "hi", "--device", "tpu"], "expected cpu, cuda"),
        (["run", "demo", "hi", "--kernels", "fast"], "expected auto, triton or reference"),
        (["run", "demo", "hi", "--top-p", "0", "--min-p", "3"], "sampling.min_p"),
        (["run", "demo", "hi", "--seed", "-1"], "sampling.seed"),
        (["run", "demo", "--tokens", "1,b"], "expected integers"),
        (["run", "demo", "hi", "--tokens", "1"], "not both"),
        (["run", "demo", "hi", "--raw", "--think"], "--raw"),
        (["inspect", "demo", "--context", "4096,0"], "positive"),
        (["score", "demo", "x", "--tokens-file", "y"], "FILE or --tokens-file"),
        (["run", "demo", "hi", "--temp", "1"], "Did you mean --temperature?"),
        (["run", "demo", "hi", "--max-new-tokens", "1"], "Did you mean --max-tokens?"),
        (["run", "demo", "hi", "--lora", "x"], "Did you mean --adapter?"),
        (["run", "demo", "hi", "-m", "x"], "Did you mean MODEL, the first argument?"),
        (["run", "demo", "-p", "hi"], "Did you mean PROMPT, the argument after MODEL?"),
        (["chat", "demo", "-p", "hi"], "No such option"),
        (["inspect", "demo", "--temp", "1"], "No such option"),
        (["run", "demo", "hi", "-q", "-v"], "either --quiet or --verbose"),
        (["cache", "eat"], "expected list or clear"),
        (["score", "demo", "x", "--window", "1"], "--window"),
        (["score", "demo", os.devnull, "--window", "10", "--stride", "10"], "--stride 10 would skip"),
        (["tiny", "--like", "7B", "out"], "expected one of E2B"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert expected in shown.err
    assert "--help." in shown.err


def test_a_missing_model_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "./no-such-model", "hi"]) == 1
    assert capsys.readouterr().err == "error: './no-such-model' does not exist on this machine\n"
    assert main(["run", "no-such-model", "hi"]) == 1
    shown = capsys.readouterr().err
    assert '"demo"' in shown
    assert "`gemcutter models` lists them" in shown


def test_a_truncated_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of_demo(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for command in (["run", str(folder), "hi"], ["inspect", str(folder)]):
        assert main(command) == 1
        shown = capsys.readouterr().err
        assert "\n  model.safetensors: is truncated" in shown
        assert "Traceback" not in shown


def test_a_config_without_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of_demo(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 10', '"num_hidden_layers": 0'))
    assert main(["run", str(folder), "hi"]) == 1
    assert "\n  num_hidden_layers: expected an integer from 1 to 4096, found 0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["inspect", "demo"], ["inspect", "demo", "--json"]], ids=" ".join)
def test_help_and_inspect_import_no_torch(words: list[str]) -> None:
    code = f"import sys; from gemcutter.cli import main; assert main({words}) == 0; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def parameters_of(command: str) -> dict[str, Any]:
    """Return the parameters of a command as the command line knows them, by name."""
    return {parameter.name: parameter for parameter in typer.main.get_command(make_app()).commands[command].params}  # type: ignore[attr-defined]


def words_of(options: dict[str, Any]) -> list[str]:
    """Format options as a user would."""
    words = list[str]()
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [option] if one is True else [option, str(one)]
    return words


def test_verbs_that_load_a_model_are_known() -> None:
    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    assert {
        command for command in commands if hasattr(import_module(f"gemcutter.cli.{command.replace('-', '_')}"), "load_model")
    } == set(LOADERS)


@pytest.mark.parametrize("command", LOADERS)
def test_a_command_that_loads_a_model_takes_every_option_of_loading(command: str) -> None:
    taken = parameters_of(command)
    for field in fields(Loading):
        assert taken[field.name].default == field.default
        assert f"--{field.name.replace('_', '-')}" in taken[field.name].opts
        assert taken[field.name].help
    assert "loading" not in taken
    is_asked = command in ("run", "chat", "eval")  # `serve` calls it as vLLM does, the others know how much they need
    assert ("context" in taken) == is_asked
    assert ("kv" in taken) == (command != "verify")  # whose cache is its own, and no engine's


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_command_that_generates_takes_every_option_of_choosing(command: str) -> None:
    taken = parameters_of(command)
    assert all(taken[field.name].default is None for field in fields(Choosing))


@pytest.mark.parametrize("command", LOADERS)
def test_what_is_said_about_loading_arrives(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[Loading, dict[str, Any]]]()

    def load_model(name: str, how: Loading, **cache: Any) -> None:
        told.append((how, cache))
        if how.quant is not None:  # all else of `verify`'s other side is plain
            raise GemcutterError("that is enough")

    monkeypatch.setattr(import_module(f"gemcutter.cli.{command.replace('-', '_')}"), "load_model", load_model)
    cache = {"run": {"context": 99, "kv": "fp8"}, "chat": {"context": 99, "kv": "fp8"}, "score": {"kv": "fp8"}}.get(command, {})
    assert set(LOADING) == {field.name for field in fields(Loading)}
    assert main([command, *LOADERS[command], *words_of(LOADING), *words_of(cache)]) == 1
    *others, (ours, engine) = told
    assert ours == Loading(**LOADING)
    assert engine.items() >= cache.items()
    shared = {name: LOADING[name] for name in ("device", "threads", "ignore", "adapter")}
    plain = Loading(**shared, dtype="float32", kernels="reference")
    assert [how for how, _ in others] == ([plain] if command == "verify" else [])


def test_all_of_it_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dict[str, Any]()

    def load(options: LoadOptions, progress: object) -> None:
        asked.update(dataclasses.asdict(options))
        raise GemcutterError("that is enough")

    monkeypatch.setattr(LoadOptions, "__post_init__", lambda options: None)  # no machine can do all of it
    monkeypatch.setattr("gemcutter.api.load_model", load)
    monkeypatch.setattr("torch.set_num_threads", lambda number: asked.update(threads=number))
    with pytest.raises(GemcutterError, match="enough"):
        load_model("demo", Loading(**LOADING), context=99, kv="fp8", max_num_seqs=2, prefix_cache_bytes=1 << 20)
    defaults = dataclasses.asdict(LoadOptions(model="demo"))
    engine = {"context": 99, "kv": "fp8", "max_num_seqs": 2, "prefix_cache_bytes": 1 << 20}
    assert asked == {**defaults, "model": "demo", **LOADING, "ignore": ("a.*", "b.*"), **engine}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, "inspect", "demo", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: input or output failed: No space left on device\n"


def test_a_reader_that_leaves_ends_a_run_in_silence() -> None:
    command = f"set -o pipefail; {shlex.join(CLI)} run demo hi --ignore-eos -n 400 | head -c 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout) == 3
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(("command", "code"), [("inspect", 0), ("doctor", 141)])
def test_a_verdict_that_nobody_read_is_none(
    command: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def print_in_vain(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", print_in_vain)
    monkeypatch.setattr("rich.console.Console.print", print_in_vain)
    monkeypatch.setattr("gemcutter.cli.app.discard_output", lambda: None)  # here it is pytest's own
    assert main([command, "demo", "--json"]) == code
    assert capsys.readouterr().err == ""


def test_an_interrupt_ends_a_run_with_130() -> None:
    process = subprocess.Popen(
        [*CLI, "run", "demo", "hi", "--ignore-eos", "-n", "30000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # the shell may have switched it off
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = subprocess.run(f"{shlex.join(CLI)} run demo <&-", shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the prompt is empty")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (MemoryError(), "error: out of memory; lower --context"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "error: out of memory; lower --context"),
        (ValueError("odd\nthing"), "error: ValueError: odd thing (unexpected; set GEMCUTTER_DEBUG=1 to see the traceback)"),
        (OSError(28, "No space left on device", "out.json"), "error: out.json: No space left on device"),
    ],
    ids=["memory", "allocator", "unexpected", "disk"],
)
def test_other_errors_are_one_line(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "load_model", fail)
    monkeypatch.delenv(failure.DEBUG, raising=False)
    assert main(["run", "demo", "hi"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(shown)
    assert told.count("\n") == 1
    monkeypatch.setenv(failure.DEBUG, "1")
    assert main(["run", "demo", "hi"]) == 1
    assert "Traceback" in capsys.readouterr().err


def copy_of_demo(folder: Path) -> Path:
    """Copy the demo model file by file."""
    for file in DEMO_FOLDER.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
