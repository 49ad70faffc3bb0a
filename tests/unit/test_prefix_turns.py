"""Conversations that grow: agents' loops of tool calls, long chats; how many tokens are computed again, counted.

The model is the demo with its own or a canonical template, and a logits processor that makes it write what a script says.
Read `test_prefix.py` for the tree, `test_splice.py` for how a reply's own ids come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter import Model
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.tools import run_tools
from tests.topologies import SIZES, build_decoder, build_oracle, plan_of, prompt
