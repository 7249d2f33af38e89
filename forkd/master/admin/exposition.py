"""Metrics as Prometheus reads them, by prometheus_client: its own text, or OpenMetrics where the client asks for it.

Nothing of what a client says comes to prometheus_client, or into an answer: there are two forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest as as_text
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics
from prometheus_client.registry import Collector

from forkd.master.admin.metrics import COUNTER, GAUGE, HISTOGRAM, Sample

_KINDS = {COUNTER: CounterMetricFamily, GAUGE: GaugeMetricFamily, HISTOGRAM: HistogramMetricFamily}

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text"
_VERSION = "version=1.0.0"

#: Turns samples into text.
Encoder = Callable[[Iterable[Sample]], bytes]


class SampleCollector(Collector):
    """Hands prometheus_client what was collected.

    Args:
        samples: what was collected.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        """A family for each metric that has a value."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily] = {}
        for sample in self._samples:
            family = families.get(sample.name)
            if family is None:
                known = sample.family
                family = families[sample.name] = _KINDS[known.kind](known.name, known.doc, labels=known.labels)
            if isinstance(family, HistogramMetricFamily):
                buckets = [("+Inf" if bound == inf else str(float(bound)), count) for bound, count in sample.buckets]
                family.add_metric(sample.labels, buckets, sample.value)
            else:
                family.add_metric(sample.labels, sample.value)
        yield from families.values()


def encoder_for(accept: str) -> tuple[Encoder, str]:
    """What turns samples into text for a client that accepts these types of content, and the type that it gets."""
    generate: Callable[[CollectorRegistry], bytes] = as_text
    content_type = _TEXT
    if any(map(_is_openmetrics, accept.split(","))):
        generate, content_type = as_openmetrics, f"{_OPENMETRICS}; {_VERSION}; charset=utf-8"

    def encoded(samples: Iterable[Sample]) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SampleCollector([*samples]))
        return generate(registry)

    return encoded, content_type


def _is_openmetrics(accepted: str) -> bool:
    """Whether one type of content is OpenMetrics, of the version that there is or of none in particular."""
    kind, *parameters = ("".join(part.split()).lower() for part in accepted.split(";"))
    versions = [one.replace('"', "") for one in parameters if one.startswith("version=")]
    return kind == _OPENMETRICS and versions in ([], [_VERSION]) and "q=0" not in parameters
