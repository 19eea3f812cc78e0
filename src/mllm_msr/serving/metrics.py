"""What Prometheus reads of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mllm_msr.serving.service import Service
from mllm_msr.serving.store import StoreUnavailable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        of_requests = ("route", "method", "status")
        self.requests = Counter("mllm_msr_requests", "Requests answered", of_requests, registry=self.registry)
        self.seconds = Histogram(
            "mllm_msr_request_seconds", "Seconds until the answer", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.events = Counter("mllm_msr_events", "Events that were new", registry=self.registry)
        queue, condenser = service.queue, service.condenser

        def due() -> float:
            try:
                return service.store.due()
            except StoreUnavailable:
                return float("nan")

        for name, text, value in (
            ("waiting_requests", "Requests in the queue", lambda: len(queue)),
            ("dropped_requests", "Requests dropped from the queue: too late, or nobody waits", lambda: queue.dropped),
            ("scored_pairs", "Pairs of user and item that the model has scored", lambda: queue.scored_pairs),
            ("forwards", "Times that the model was asked to score", lambda: queue.batches),
            ("tokens_per_second", "What the model has scored lately", lambda: queue.tokens_per_second),
            ("preferences_written", "History blocks condensed", lambda: condenser.written),
            ("condensing_failures", "Times that condensing failed", lambda: condenser.failures),
            ("users_due", "Users with a history block that is not condensed", due),
            ("items", "Items of the catalogue", lambda: len(service.catalogue)),
        ):
            Gauge(f"mllm_msr_{name}", text, registry=self.registry).set_function(value)
