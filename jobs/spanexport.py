"""Where spans go, if an endpoint is set; needs the packages of the extra `tracing`."""

from __future__ import annotations

import atexit
import os
import threading

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

# At the end of the process, for a collector that does not answer: `layerstack up` waits for its children.
_FLUSH_S = 2.0


def export(service: str) -> None:
    """Send the spans of this process by OTLP over HTTP, as the `OTEL_*` variables say, until it ends.

    Args:
        service: its name, unless `OTEL_SERVICE_NAME` is set.
    """
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    # The provider's own flush at exit would wait 30 s for a collector that is away.
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    atexit.register(_flush, provider)


def _flush(provider: TracerProvider) -> None:
    flushing = threading.Thread(target=provider.shutdown, name="flush-spans", daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
