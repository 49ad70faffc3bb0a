"""Run the command line as `python -m gemcutter.cli`, where no script is installed."""

from __future__ import annotations

import sys

from gemcutter.cli import main

sys.exit(main())
