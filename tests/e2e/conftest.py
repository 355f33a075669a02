"""One server for the whole session, on the real weights of the default model."""

from collections.abc import Iterator

import pytest

from tokenspeed.loader import ModelFiles

from .serving import Serve


@pytest.fixture(scope="session")
def server(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`tokenspeed serve` with no model named; `smollm2` has fetched the weights before."""
    with Serve(tmp_path_factory.mktemp("serve") / "log") as running:
        yield running
