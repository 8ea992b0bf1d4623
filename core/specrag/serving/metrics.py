"""What Prometheus is told. Each application has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

# Seconds: a reader answers in a tenth of one, RAPID may read a document for minutes.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHARES = tuple(share / 10 for share in range(1, 11))


class Metrics:
    """The metrics of one server. None of them names a question, a file, an index or a key."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "specrag_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "specrag_request_seconds",
            "From the first byte of a request to the last of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage = Histogram(
            "specrag_stage_seconds",
            "Seconds in each stage of an answer.",
            ("model", "stage"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answers = Counter(
            "specrag_answers", "Answers by model and outcome.", ("model", "outcome"), registry=self.registry
        )
        self.drafts = Counter(
            "specrag_drafts",
            "Drafts by outcome: verified, abstained, unverified or failed.",
            ("outcome",),
            registry=self.registry,
        )
        self.tokens = Counter(
            "specrag_tokens", "Tokens that the models read and wrote.", ("model", "kind"), registry=self.registry
        )
        self.candidates = Counter(
            "specrag_rapid_candidates", "Candidate tokens of RAPID by outcome.", ("outcome",), registry=self.registry
        )
        self.acceptance = Histogram(
            "specrag_rapid_acceptance",
            "Share of a reply's candidate tokens that were accepted.",
            buckets=_SHARES,
            registry=self.registry,
        )
        self.queue_depth = Gauge("specrag_queue_depth", "Requests that wait for their turn.", registry=self.registry)
        self.running = Gauge("specrag_running", "Requests that are worked on.", registry=self.registry)

    def stages(self, model: str, seconds: dict[str, float]) -> None:
        """Count what each stage of one answer took. A stage that did not run is left out."""
        for stage, value in seconds.items():
            if value > 0:
                self.stage.labels(model, stage).observe(value)
