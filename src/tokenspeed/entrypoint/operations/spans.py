"""Requests that ended as OpenTelemetry spans. Off unless `--otlp-endpoint` names a collector."""

from typing import TYPE_CHECKING

from tokenspeed import __version__
from tokenspeed.core.errors import ConfigError
from tokenspeed.entrypoint.operations.records import EndedRequest
from tokenspeed.entrypoint.operations.timeline import sample_phases_us

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["SpanExport", "otlp_provider"]


def otlp_provider(endpoint: str) -> "TracerProvider":
    """Sends spans to a collector over HTTP, in batches, in a thread of its own.

    Args:
        endpoint: the collector's URL for traces, as `http://localhost:4318/v1/traces`.

    Raises:
        ConfigError: the packages are not installed, or the endpoint is no URL.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint needs OpenTelemetry, and there is no {error.name}: "
            "pip install 'tokenspeed[otel]', or leave the flag out"
        ) from None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            "--otlp-endpoint must be a URL, as http://localhost:4318/v1/traces, "
            f"but is {endpoint!r}"
        )
    resource = Resource.create({"service.name": "tokenspeed", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class SpanExport:
    """Makes a span of each request that ended, with a child for each phase of each sample.

    The phases of a sample are drawn one after the other, in the order in which a request meets
    them: a stall between two tokens is drawn before the decoding that it interrupted. Nothing of
    a prompt or an answer is sent but their lengths.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tokenspeed", __version__)

    def export(self, request: EndedRequest) -> None:
        """Hand a request to the exporter; returns at once."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415

        attributes: dict[str, str | int | float] = {
            "tokenspeed.request.id": request.id,
            "tokenspeed.request.outcome": request.outcome,
            "gen_ai.operation.name": "generate",
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "gen_ai.usage.output_tokens": request.output_tokens,
            "tokenspeed.usage.cached_tokens": request.cached_tokens,
            "tokenspeed.usage.draft_tokens": request.drafted_tokens,
            "tokenspeed.usage.accepted_tokens": request.accepted_tokens,
        }
        if request.tenant is not None:
            attributes["tokenspeed.tenant"] = request.tenant
        if request.session is not None:
            attributes["tokenspeed.session"] = request.session
        arrived_ns = round(request.arrived_unix_s * 1e9)
        began_ns = arrived_ns if request.sent_unix_s is None else round(request.sent_unix_s * 1e9)
        span = self._tracer.start_span(
            "request", kind=SpanKind.SERVER, attributes=attributes, start_time=began_ns
        )
        context = set_span_in_context(span)
        if began_ns < arrived_ns:
            self._tracer.start_span("gateway", context, start_time=began_ns).end(arrived_ns)
        for index, sample in enumerate(request.samples):
            at_ns = arrived_ns
            for phase, spent_us in sample_phases_us(request, sample).items():
                end_ns = at_ns + spent_us * 1000
                if spent_us:
                    child = self._tracer.start_span(
                        phase,
                        context,
                        attributes={"tokenspeed.sample": index},
                        start_time=at_ns,
                    )
                    child.end(end_ns)
                at_ns = end_ns
        if request.error is not None:
            span.set_status(Status(StatusCode.ERROR, request.error))
        span.end(arrived_ns + round((request.ended_s - request.arrived_s) * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
