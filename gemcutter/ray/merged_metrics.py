"""What several replicas count, as one page for Prometheus.

Owns the merging: a family is described once, and each replica's samples stand under a number of its own. Read
`server/metrics.py` for what is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

ENGINE = "engine"  # the label that tells replicas apart, as vLLM tells its engines


class Collected:
    """Families of metrics that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        yield from self._families


def merged(pages: Sequence[bytes]) -> bytes:
    """Return one page of several, those of replicas 0, 1 ... in order."""
    families = dict[str, Metric]()
    for number, page in enumerate(pages):
        for family in text_string_to_metric_families(page.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, ENGINE: str(number)}))
    return generate_latest(Collected(list(families.values())))
