"""Holds requests for an OpenTelemetry collector to the protocol's own schema (pip's opentelemetry-proto).

Standard input: a JSON list of [path, body]. Nothing is printed where all is well; else what is wrong, with exit code 1.
"""

import base64
import json
import re
import sys

from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

REQUESTS = {"/v1/metrics": ExportMetricsServiceRequest, "/v1/traces": ExportTraceServiceRequest}
ID_BYTES = {"traceId": 16, "spanId": 8, "parentSpanId": 8}
YEAR_2020_NS = 1_577_836_800 * 10**9


def ids_as_base64(value):
    """Ids are hexadecimal in this protocol's JSON, unlike other bytes in JSON of protobufs."""
    if isinstance(value, list):
        return [ids_as_base64(v) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, v in value.items():
        if key in ID_BYTES:
            if not re.fullmatch("[0-9a-f]{%d}" % (2 * ID_BYTES[key]), v) or set(v) == {"0"}:
                raise ValueError(f"{key} {v!r} is no id")
            v = base64.b64encode(bytes.fromhex(v)).decode()
        out[key] = ids_as_base64(v)
    return out


def check(path, body):
    if path not in REQUESTS:
        raise ValueError("no collector listens there")
    # Names that the schema does not have are refused.
    request = json_format.ParseDict(ids_as_base64(body), REQUESTS[path]())
    if path == "/v1/metrics":
        for resource in request.resource_metrics:
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                points = metric.gauge.data_points
                if not metric.name or not points:
                    raise ValueError(f"metric {metric.name!r} has no points")
                if any(p.time_unix_nano < YEAR_2020_NS or p.WhichOneof("value") is None for p in points):
                    raise ValueError(f"a point of {metric.name} has no time or no value")
        return
    for resource in request.resource_spans:
        for span in (s for scope in resource.scope_spans for s in scope.spans):
            if not YEAR_2020_NS < span.start_time_unix_nano <= span.end_time_unix_nano:
                raise ValueError(f"a span from {span.start_time_unix_nano} to {span.end_time_unix_nano}")


wrong = 0
for path, body in json.load(sys.stdin):
    try:
        check(path, body)
    except (ValueError, TypeError, json_format.ParseError) as e:
        print(f"{path}: {e}")
        wrong = 1
sys.exit(wrong)
