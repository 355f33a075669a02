"""Which gRPC status tells a client which of our errors."""

import grpc

from tokenspeed.core.errors import (
    ContextOverflow,
    EngineDead,
    InvalidParameter,
    Overloaded,
    RequestError,
    TokenSpeedError,
)

__all__ = ["status_of"]

# The gateway turns these into HTTP 400, 400, 400, 429, 503 and 500.
_STATUS: dict[type[BaseException], grpc.StatusCode] = {
    InvalidParameter: grpc.StatusCode.INVALID_ARGUMENT,
    ContextOverflow: grpc.StatusCode.INVALID_ARGUMENT,
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineDead: grpc.StatusCode.UNAVAILABLE,
    TokenSpeedError: grpc.StatusCode.INTERNAL,
}


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and the message of an error; what is not ours is INTERNAL and named."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind], str(error)
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
