"""`python -m gemcutter`: the command line."""

import sys

from gemcutter.cli import main

sys.exit(main())
