"""The command line: argv in, text or JSON out.

Owns the commands (one file each), their options and what the terminal shows; refuses to know kernels, pages and file formats.
Only a command that runs a model imports torch, and only once its options are sound. Read `app.py` for the list of commands and
the exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gemcutter.cli.torch_libraries import load_ahead
from gemcutter.gc_pause import collector_paused

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and give its exit code; whatever happens is told in a message."""
    load_ahead(sys.argv[1:] if arguments is None else arguments)
    with collector_paused():
        from gemcutter.cli import app
    return app.main(arguments)
