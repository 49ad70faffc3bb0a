"""Two hosts, as network namespaces, over a link that delays packets and loses some: text is that of one process, however slow."""

from __future__ import annotations

import signal
import time

import pytest

from bench.links import Link, can_link, run_on
from gemcutter import native
from tests.parallel.test_parity import model

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(not can_link(), reason="needs Linux, root, `ip` and /dev/net/tun"),
]

QUESTION, TOKENS = "What is a lantern?", 8
RUN = ["-m", "gemcutter", "run", "demo", QUESTION, "-n", str(TOKENS), "--dtype", "float32", "--ignore-eos"]
WAYS = [[], ["--pp", "2"]]
SOON_S = 60.0


@pytest.mark.parametrize("options", WAYS, ids=["tensor", "pipeline"])
@pytest.mark.parametrize(("delay_s", "loss"), [(0.001, 0.01), (0.01, 0.01)])
def test_a_slow_link_that_loses_packets_changes_no_text(options: list[str], delay_s: float, loss: float) -> None:
    with model("demo") as one:
        wanted = one.chat([{"role": "user", "content": QUESTION}], max_tokens=TOKENS, temperature=0.0, ignore_eos=True).text
    with Link(delay_s, loss) as link:
        first, other = run_on(link, [*RUN, *options])
        said, problem = first.communicate(timeout=SOON_S)
        assert first.returncode == 0, problem
        assert other.wait(SOON_S) == 0
    assert said.strip() == wanted.strip()
    assert link.carried > 100


@pytest.mark.parametrize("options", WAYS, ids=["tensor", "pipeline"])
def test_a_host_that_is_cut_off_ends_the_others_requests(options: list[str]) -> None:
    """Nothing says that the other host is gone: no packet comes any more."""
    with Link(0.001) as link:
        first, other = run_on(link, [*RUN[:-4], "100000", "--ignore-eos", *options])
        assert first.stdout is not None
        assert first.stdout.read(20)  # the reply has begun
        link.loss = 1.0
        cut = time.monotonic()
        assert "error:" in first.communicate(timeout=SOON_S)[1]
        assert time.monotonic() - cut < SOON_S
        assert first.returncode == 1
        other.send_signal(signal.SIGKILL)
        other.communicate()
