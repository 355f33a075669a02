"""OpenTelemetry spans of requests that ended."""

import sys

import pytest

from tokenspeed.core.errors import ConfigError
from tokenspeed.engine.facts import RequestTimes
from tokenspeed.entrypoint.operations.records import EndedRequest, SampleRecord
from tokenspeed.entrypoint.operations.spans import SpanExport, otlp_provider

REASON = "the extra `otel` is not installed"


def ended(*, error: str | None = None, sent_unix_s: float | None = None) -> EndedRequest:
    """A request that came at 100 s, of 30 ms in the engine, seen to its end 2 ms later."""
    times = RequestTimes(
        constraint_us=0,
        queue_us=4_000,
        restore_us=0,
        prefill_us=6_000,
        stall_us=0,
        decode_us=20_000,
        first_token_at_us=100_011_000,
        ended_at_us=100_031_000,
    )
    sample = SampleRecord(
        tokens=5,
        drafted_tokens=4,
        accepted_tokens=2,
        outcome="length",
        first_token_s=100.0115,
        ended_s=100.032,
        times=times,
    )
    return EndedRequest(
        number=1,
        id="r",
        tenant="ann",
        session=3,
        sent_unix_s=sent_unix_s,
        arrived_s=100.0,
        arrived_unix_s=5_000.0,
        ended_s=100.033,
        prompt_tokens=7,
        cached_tokens=2,
        cache=None,
        outcome="length",
        error=error,
        samples=(sample,),
    )


def test_a_request_becomes_a_span_with_a_child_for_each_phase() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=REASON)
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=REASON
    )
    exporter = memory.InMemorySpanExporter()
    provider = trace.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    spans = SpanExport(provider)
    spans.export(ended(sent_unix_s=4_999.99))
    spans.export(ended(error="the engine is gone"))
    found = exporter.get_finished_spans()
    spans.close()
    first = [span for span in found if span.context.trace_id == found[0].context.trace_id]
    request = next(span for span in first if span.name == "request")
    children = [span for span in first if span is not request]
    assert [(span.name, (span.end_time - span.start_time) // 1000) for span in children] == [
        ("gateway", 10_000),
        ("servicer", 1_000),
        ("queue", 4_000),
        ("prefill", 6_000),
        ("decode", 20_000),
        ("delivery", 2_000),
    ]
    assert all(span.parent.span_id == request.context.span_id for span in children)
    assert (request.start_time, request.end_time) == (4_999_990_000_000, 5_000_033_000_000)
    assert request.attributes["gen_ai.usage.input_tokens"] == 7
    assert request.attributes["tokenspeed.usage.draft_tokens"] == 4
    assert request.attributes["tokenspeed.usage.accepted_tokens"] == 2
    assert request.attributes["tokenspeed.tenant"] == "ann"
    failed = [span for span in found if span.name == "request"][1]
    assert failed.status.description == "the engine is gone"


def test_an_endpoint_without_the_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"tokenspeed\[otel\]"):
        otlp_provider("http://127.0.0.1:4318/v1/traces")


def test_an_endpoint_must_be_a_url() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=REASON)
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        otlp_provider("localhost:4318")
