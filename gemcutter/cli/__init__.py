"""The command line: argv in, text or JSON out.

Owns the verbs (one file each), their options and what the terminal shows; refuses to know kernels, pages and file formats. Only
a verb that runs a model imports torch, and only once its options are sound. Read `app.py` for the list of verbs and the exit
codes.
"""

from __future__ import annotations

from gemcutter.cli.app import main

__all__ = ["main"]
