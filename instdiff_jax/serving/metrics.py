"""What `/metrics` shows, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3, 6, 12, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, waiting: Callable[[], float]):
        self._registry = CollectorRegistry()
        self.requests = self._make(Counter, "requests", "Answers by path and status.", labelnames=("path", "status"))
        self.seconds = self._make(Histogram, "request_seconds", "From a job's request to its end.", buckets=_SECONDS)
        self.images = self._make(Counter, "images", "Pictures drawn.")
        self.batch_images = self._make(Histogram, "batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32))
        self.batch_seconds = self._make(Histogram, "batch_seconds", "From a batch's start to its pictures.")
        self._make(Gauge, "waiting_images", "Images that wait.").set_function(waiting)

    def _make(self, kind: type, name: str, text: str, **options: object):
        return kind(f"instdiff_{name}", text, registry=self._registry, **options)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
