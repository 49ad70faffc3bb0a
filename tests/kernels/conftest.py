"""The processor levels that kernel tests run at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gemcutter import native
from gemcutter.errors import KernelError


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use the kernels of one processor level; skip levels that library and processor lack. `test_levels.py` emulates those."""
    before = native.level()
    try:
        native.set_level(request.param)
    except KernelError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_level(before)
