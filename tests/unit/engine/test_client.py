"""What an engine hears of a request."""

from collections.abc import Callable

import numpy as np
from tests.unit.entrypoint.scripted_engine import ScriptedEngine

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.client import EngineClient
from tokenspeed.engine.wire import Submit, decode_to_engine


class Socket:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def listen(self, handler: Callable[[bytes], None]) -> None:
        pass

    def send(self, data: bytes) -> None:
        self.sent.append(data)


def submitted(**options: int | str | None) -> Submit:
    """The message of one request."""
    socket, engine = Socket(), ScriptedEngine()
    client = EngineClient(socket, engine.info, engine.tokenizer)  # type: ignore[arg-type]
    client.generate([1, 2, 3], SamplingParams(max_new_tokens=4, seed=5), **options)  # type: ignore[arg-type]
    (data,) = socket.sent
    message = decode_to_engine(data)
    assert isinstance(message, Submit)
    return message


def test_the_engine_hears_the_request_as_it_was_made() -> None:
    message = submitted(salt=2**64 - 1, priority=-3)
    assert np.frombuffer(message.prompt, dtype=np.int32).tolist() == [1, 2, 3]
    assert (message.max_new_tokens, message.seed) == (4, 5)
    assert (message.salt, message.priority, message.tenant) == (2**64 - 1, -3, None)


def test_a_tenant_has_one_number_and_no_other_s() -> None:
    ann, again, bob = (submitted(tenant=name).tenant for name in ("ann", "ann", "bob"))
    assert ann == again != bob
    assert None not in (ann, bob)
