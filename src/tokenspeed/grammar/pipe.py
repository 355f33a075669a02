"""The messages between an engine and its constraint worker: msgpack, each after its length."""

import os

import msgspec

from tokenspeed.core.constraint import ConstraintKind
from tokenspeed.grammar.tokens import TokenTable

__all__ = ["Begin", "Cancel", "FromWorker", "Reader", "ToWorker", "Trial", "Verdict", "encode"]

_LENGTH_SIZE_BYTES = 8
_READ_SIZE_BYTES = 1 << 16


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """The first message: the tokens, and what a trial may take.

    Attributes:
        time_max_s: seconds of CPU; of the clock, some times as many.
        memory_max_bytes: bytes of address space beyond the worker's own.
    """

    table: TokenTable
    time_max_s: int
    memory_max_bytes: int


class Trial(msgspec.Struct, frozen=True, tag="trial", array_like=True):
    """Translate, compile and try out a constraint."""

    number: int
    kind: ConstraintKind
    text: str


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Nobody waits for a trial any more; one that has ended is ignored."""

    number: int


class Verdict(msgspec.Struct, frozen=True, tag="verdict", array_like=True):
    """The end of a trial.

    Attributes:
        grammar: the constraint as the library reads it; None where it was refused.
        refusal: why, where it was.
        lasting: whether another trial would end the same way, however busy the machine.
    """

    number: int
    grammar: str | None
    refusal: str | None = None
    lasting: bool = True


ToWorker = Begin | Trial | Cancel
FromWorker = Verdict

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToWorker | FromWorker) -> bytes:
    """The bytes of a message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_SIZE_BYTES, "little") + body


class Reader:
    """Reads messages from a file descriptor.

    Args:
        descriptor: a pipe; blocking or not.
        kind: the union of messages to expect.
    """

    def __init__(self, descriptor: int, kind: object) -> None:
        self._descriptor = descriptor
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(kind)
        self._data = bytearray()
        self.ended = False

    def read(self) -> list[object]:
        """Read once; the messages that are whole now. `ended` is set at the end.

        Raises:
            msgspec.DecodeError: something else came.
        """
        data = os.read(self._descriptor, _READ_SIZE_BYTES)
        self.ended = not data
        self._data += data
        messages = []
        while len(self._data) >= _LENGTH_SIZE_BYTES:
            end = _LENGTH_SIZE_BYTES + int.from_bytes(self._data[:_LENGTH_SIZE_BYTES], "little")
            if len(self._data) < end:
                break
            messages.append(self._decoder.decode(self._data[_LENGTH_SIZE_BYTES:end]))
            del self._data[:end]
        return messages
