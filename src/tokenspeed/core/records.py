"""Values that may cross to another process: msgspec's structs where that package is installed.

An engine in the caller's own process sends nothing and does without the package: its records are
dataclasses then, which are made, compared and read in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import get_annotations
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from tokenspeed.core.errors import ConfigError

__all__ = ["PlainRecord", "Record", "decoder", "encode", "json_text", "set_field"]


class PlainRecord:
    """A dataclass, declared as a struct of msgspec is; how a struct is to be encoded is nothing to
    it."""

    __struct_fields__: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls,
        *,
        frozen: bool = False,
        kw_only: bool = False,
        tag: str | bool | None = None,
        array_like: bool = False,
        omit_defaults: bool = False,
    ) -> None:
        for name in get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, dict | list):
                # Every record has its own, as it has of a struct.
                setattr(cls, name, field(default_factory=default.copy))
        dataclass(frozen=frozen, kw_only=kw_only)(cls)
        cls.__struct_fields__ = tuple(each.name for each in fields(cls))  # type: ignore[arg-type]


if TYPE_CHECKING:
    from msgspec import Struct as Record
else:
    try:
        from msgspec import Struct as Record
    except ImportError:
        Record = PlainRecord


def set_field(record: Record, name: str, value: object) -> None:
    """Set a field of a frozen record that nobody has seen yet."""
    if isinstance(record, PlainRecord):
        object.__setattr__(record, name, value)
    else:
        _msgspec().structs.force_setattr(record, name, value)


def encode(value: object) -> bytes:
    """The msgpack of a record or dataclass; raises ConfigError where msgspec is not installed."""
    encoded: bytes = _encoder().encode(value)
    return encoded


def json_text(value: object) -> str:
    """The JSON of a record or dataclass; raises ConfigError where msgspec is not installed."""
    text: str = _msgspec().json.encode(value).decode()
    return text


def decoder(kind: Any) -> Callable[[bytes], Any]:
    """What reads msgpack of a kind of record, or of a union of them; it raises
    `msgspec.DecodeError` on anything else.

    Raises:
        ConfigError: msgspec is not installed.
    """
    read: Callable[[bytes], Any] = _msgspec().msgpack.Decoder(kind).decode
    return read


@cache
def _encoder() -> Any:
    return _msgspec().msgpack.Encoder()


def _msgspec() -> ModuleType:
    try:
        import msgspec  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "processes of an engine speak to each other by the package msgspec, which is not "
            "installed: `pip install msgspec`, or keep to one rank in this process"
        ) from None
    return msgspec
