"""Prometheus metrics: under vLLM's names, so that its dashboards and routers work, and our own beside them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from lragent.serve.api.service import Service
from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.types import FinishReason
from lragent.serve.ledger.ledger import Ledger

SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
RECENT = 512
"""Values from which the page's percentiles are taken."""


@dataclass
class Histogram:
    """Counts of values by bucket. Observed by one thread; a reader may see it a value late."""

    buckets: Sequence[float] = SECONDS
    total: float = 0.0
    recent: list[float] = field(default_factory=list)
    _at: int = 0

    def __post_init__(self) -> None:
        self._counts = [0] * (len(self.buckets) + 1)

    def observe(self, value: float) -> None:
        """One more."""
        self._counts[bisect_left(self.buckets, value)] += 1
        self.total += value
        if len(self.recent) < RECENT:
            self.recent.append(value)
        else:
            self.recent[self._at] = value
            self._at = (self._at + 1) % RECENT

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    def percentile(self, share: float) -> float | None:
        """Of the last `RECENT` values; None where there are none."""
        values = sorted(self.recent)
        return values[min(len(values) - 1, int(share * len(values)))] if values else None

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it."""
        total, rows = 0, []
        for bound, count in zip((*map(str, self.buckets), "+Inf"), self._counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


@dataclass
class Latencies:
    """Times of all requests, in seconds; fed by the engine's thread."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    finished: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""


class Metrics:
    """A registry of its own for one server: collected when it is asked for."""

    def __init__(self, service: Service, latencies: Latencies, ledger: Ledger | None) -> None:
        self.registry = CollectorRegistry()
        self._service, self._latencies, self._ledger = service, latencies, ledger
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric with its value now."""
        stats, model = self._service.stats(), self._service.model_name

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([model], value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([model], value)
            return family

        yield gauge("vllm:num_requests_running", "Requests that run.", stats.running)
        yield gauge("vllm:num_requests_waiting", "Requests that wait.", stats.waiting)
        used = stats.slots_used / stats.slots_total if stats.slots_total else 0.0
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache's slots that are used, 0 to 1.", used)
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prompt_tokens)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prompt_tokens - stats.tokens_computed)
        yield counter("vllm:prompt_tokens", "Prompt tokens of ended requests.", stats.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens generated.", stats.drawn)
        yield counter("vllm:num_preemptions", "Requests preempted.", stats.preempted)
        ended = CounterMetricFamily("vllm:request_success", "Ended requests.", labels=["model_name", "finished_reason"])
        names = {FinishReason.CANCELLED: "abort"} | {
            each: str(each) for each in (FinishReason.STOP, FinishReason.LENGTH)
        }
        for reason in FinishReason:
            ended.add_metric([model, names.get(reason, str(reason))], self._latencies.finished[reason])
        yield ended
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", self._latencies.first_token),
            ("vllm:inter_token_latency_seconds", "Between two tokens.", self._latencies.between_tokens),
            ("vllm:e2e_request_latency_seconds", "From arrival to the end.", self._latencies.whole),
        ):
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            family.add_metric([model], histogram.cumulative(), histogram.total)
            yield family
        roles = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Roles with requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running = ",".join(sorted(name for name in stats.running_roles if name != "base"))
        roles.add_metric([str(stats.role_places), running, ""], time.time())
        yield roles
        yield from self._own(model, stats)

    def _own(self, model: str, stats: EngineStats) -> Iterator[Metric]:
        """Ours, out of the same look at the engine."""
        loaded = ",".join(sorted(card.name for card in self._service.roles if card.parent is not None))
        info = GaugeMetricFamily("lragent:info", "What is served.", labels=["model_name", "sharing", "roles"])
        info.add_metric([model, str(self._service.sharing), loaded], 1)
        yield info
        for name, text, field_ in (
            ("lragent:requests", "Ended requests.", "finished"),
            ("lragent:prompt_tokens", "Prompt tokens.", "prompt_tokens"),
            ("lragent:tokens_computed", "Prompt tokens that went through the model.", "tokens_computed"),
            ("lragent:base_tokens_reused", "Prompt tokens whose base cache was found.", "base_reused"),
            ("lragent:lr_tokens_reused", "Prompt tokens whose LR cache was found.", "lr_reused"),
            ("lragent:lr_prefill_tokens", "Prompt tokens run over base cache to write LR.", "lr_prefilled"),
            ("lragent:generated_tokens", "Tokens of answers of ended requests.", "generated"),
        ):
            family = CounterMetricFamily(name, text, labels=["model_name", "role"])
            for role, sums in stats.roles.items():
                family.add_metric([model, role], getattr(sums, field_))
            yield family
        cache = GaugeMetricFamily("lragent:cache_bytes", "Bytes of the cache.", labels=["model_name", "part", "state"])
        for part, used, total in (
            ("base", stats.base_bytes_used, stats.base_bytes_total),
            ("lr", stats.lr_bytes_used, stats.lr_bytes_total),
        ):
            cache.add_metric([model, part, "used"], used)
            cache.add_metric([model, part, "total"], total)
        yield cache
        evicted = CounterMetricFamily("lragent:evicted", "Cache entries evicted.", labels=["model_name", "part"])
        evicted.add_metric([model, "base"], stats.base_evicted)
        evicted.add_metric([model, "lr"], stats.lr_evicted)
        yield evicted
        for name, text, field_ in (
            ("lragent:replica_alive", "Whether the replica serves.", "alive"),
            ("lragent:replica_requests_open", "Open requests of the replica.", "open"),
            ("lragent:replica_starts", "How often an engine has begun in its place.", "starts"),
            ("lragent:replica_requests_left", "Open requests left behind where an engine ended.", "left"),
        ):
            each_replica = GaugeMetricFamily(name, text, labels=["model_name", "replica"])
            for state in self._service.replicas:
                each_replica.add_metric([model, state.name], getattr(state, field_))
            if self._service.replicas:
                yield each_replica
        if self._ledger is not None:
            yield GaugeMetricFamily(
                "lragent:ledger_pending", "Ledger entries not on disk yet.", value=self._ledger.store.pending
            )
