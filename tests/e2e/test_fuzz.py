"""Some hundred random calls; `python -m tests.fuzz.servicer` and `tests.fuzz.gateway` make more."""

import pytest

from tests.fuzz.servicer import fuzz

from .serving import Serve


@pytest.mark.slow
def test_random_calls_are_answered_or_refused(server: Serve) -> None:
    seed = 11
    report = fuzz(server, requests=360, first_seed=seed)
    print(f"seed {seed}: {report}")
    # Neither way is the answer to all.
    assert report.admitted >= report.calls // 2
    assert report.hostile["INVALID_ARGUMENT"] >= 20
    assert {"stop", "length", "left"} <= report.honest.keys()


@pytest.mark.slow
def test_random_http_requests_get_no_5xx(server: Serve) -> None:
    gateway = pytest.importorskip(
        "tests.fuzz.gateway", reason="schemathesis is not installed: pip install '.[dev]'"
    )
    seed = 11
    statuses = gateway.fuzz(server, requests=210, first_seed=seed).statuses
    print(f"seed {seed}: {statuses}")
    assert statuses["/v1/chat/completions 200"] > 5
    assert sum(count for name, count in statuses.items() if name.endswith(" 400")) > 20
