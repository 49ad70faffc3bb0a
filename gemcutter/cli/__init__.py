"""The command line: argv in, text or JSON out.

Owns the commands (one file each), their options and what the terminal shows; refuses to know kernels, pages and file formats.
Only a command that runs a model imports torch, and only once its options are sound. Read `app.py` for the list of commands and
the exit codes.
"""

from __future__ import annotations

from gemcutter.cli.app import main

__all__ = ["main"]
