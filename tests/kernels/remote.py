"""A pytest plugin that runs kernels in another process, under an emulator of another processor.

`python -m pytest -p remote ...` with this folder on PYTHONPATH makes the library that GEMCUTTER_NATIVE names answer through the
program that GEMCUTTER_REMOTE starts, for instance `qemu-aarch64 -cpu max build/arm/remote_calls`. Owns the passing of arguments;
refuses to know what functions do: their pointers are fetched page by page (remote_calls.cpp). `tools/arm.sh` builds both.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

from gemcutter import native

REQUEST = struct.Struct("64s16q8f")
ANSWER = struct.Struct("q")
WRAP = 1 << 64


def integer(argument: Any) -> int:
    """Return what the processor would see in a register: an integer, or the address of the memory that an argument names."""
    if argument is None:
        return 0
    if isinstance(argument, int):
        return argument
    if isinstance(argument, bytes):  # the caller's own, which outlives the call
        return ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
    if isinstance(argument, ctypes.Array | ctypes.Structure):
        return ctypes.addressof(argument)
    if hasattr(argument, "_obj"):  # byref
        return ctypes.addressof(argument._obj)
    if hasattr(argument, "contents"):
        return ctypes.cast(argument, ctypes.c_void_p).value or 0
    return argument.value or 0


class Function:
    """One function of the remote library, with the attributes of a ctypes function that callers set."""

    def __init__(self, library: Remote, name: str) -> None:
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = ctypes.c_int
        self._library, self._name = library, name

    def __call__(self, *arguments: Any) -> Any:
        """Call it with ctypes values, or with whatever `argtypes` say that plain ones are."""
        integers, floats = [], []
        for place, argument in enumerate(arguments):
            kind = self.argtypes[place] if self.argtypes else type(argument)
            if kind is ctypes.c_float:
                floats.append(getattr(argument, "value", argument))
            else:
                integers.append(integer(argument))
        answer = self._library.ask(self._name, integers, floats)
        if self.restype is ctypes.c_char_p:  # the other process' memory
            text = ctypes.create_string_buffer(64)
            self._library.ask("strcpy", [ctypes.addressof(text), answer], [])
            return text.value
        return None if self.restype is None else self.restype(answer).value


class Remote(ctypes.CDLL):
    """A library in another process that looks like one in this."""

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        self._lock = threading.Lock()
        memory = os.open("/proc/self/mem", os.O_RDWR)
        command = [*shlex.split(os.environ["GEMCUTTER_REMOTE"]), str(path), str(memory)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory])

    def __getitem__(self, name: str) -> Any:  # __getattr__ of CDLL keeps what it returns
        return Function(self, name)

    def ask(self, name: str, integers: list[int], floats: list[float]) -> int:
        """Call a function there and wait. Raises RuntimeError if the process ended instead."""
        signed = [(number + WRAP // 2) % WRAP - WRAP // 2 for number in integers] + [0] * (16 - len(integers))
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(REQUEST.pack(name.encode(), *signed, *floats, *[0.0] * (8 - len(floats))))
            self._process.stdin.flush()
            answer = self._process.stdout.read(ANSWER.size)
        if len(answer) < ANSWER.size:
            raise RuntimeError(f"{name}: the process that runs it ended with {self._process.wait()}")
        return int(ANSWER.unpack(answer)[0])


def load(path: Path) -> ctypes.CDLL:
    """Start the process, in place of `native._load`."""
    found = Remote(path)
    assert found.gc_version() == native.VERSION, f"{path} was built from other sources"
    found.gc_level.restype = ctypes.c_char_p
    return found


native._load = load
