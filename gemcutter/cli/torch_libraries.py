"""torch's libraries, loaded by a thread while Python still reads modules and options.

Owns the choice of commands that run a model. Loading them is a good part of `import torch` and leaves Python's lock free: it
costs nothing where a second core is idle. Imports no torch itself, and refuses to know what a command does.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from threading import Thread

RUNNING = ("run", "chat", "serve", "score", "eval", "verify", "bench")
HELP = ("-h", "--help")


def load_ahead(words: Sequence[str]) -> None:
    """Begin to load torch's libraries if these words of a command line will need them; `import torch` waits for what is begun."""
    if words[:1] and words[0] in RUNNING and not set(words) & set(HELP) and "torch" not in sys.modules:
        Thread(target=_load, name="torch libraries", daemon=True).start()


def _load() -> None:
    found = PathFinder.find_spec("torch")
    if found is not None and found.origin is not None:
        with suppress(OSError):  # another system's, or damaged: importing torch will say so
            ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libtorch.so"))
