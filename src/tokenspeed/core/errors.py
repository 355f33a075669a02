"""The exception tree of the package.

    TokenSpeedError
    ├── ConfigError            a flag or a field of the configuration is wrong
    │   └── InsufficientMemory the model and its cache do not fit
    ├── ModelError             a model cannot be had or read
    │   ├── ModelNotFound      no such path, manifest or hub id
    │   ├── CorruptCheckpoint  truncated or damaged file, wrong hash, missing tensor
    │   ├── UnsupportedModel   architecture or quantisation that no code here handles
    │   └── PlacementError     modules of a model whose placements do not fit together
    ├── WorkloadError          a trace cannot be read: not there, malformed, out of range
    ├── MeasurementError       a server that is measured is not there, or cannot go on
    ├── KernelError            no kernel fits, or a forced one cannot run
    ├── RequestError           the request is wrong; the engine goes on
    │   ├── InvalidParameter   a sampling parameter outside its range
    │   ├── ContextOverflow    the prompt leaves no room in the context
    │   └── Overloaded         refused for load; says when to come back
    └── EngineError            the engine failed
        └── EngineDead         the engine process is gone

An error says what was wanted, what came, what the choices are, and the flag that fixes it.
"""

__all__ = [
    "ConfigError",
    "ContextOverflow",
    "CorruptCheckpoint",
    "EngineDead",
    "EngineError",
    "InsufficientMemory",
    "InvalidParameter",
    "KernelError",
    "MeasurementError",
    "ModelError",
    "ModelNotFound",
    "Overloaded",
    "PlacementError",
    "RequestError",
    "TokenSpeedError",
    "UnsupportedModel",
    "WorkloadError",
]


class TokenSpeedError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(TokenSpeedError):
    """A flag or a field of the configuration is wrong."""


class InsufficientMemory(ConfigError):
    """The model and its cache do not fit in the memory at hand."""


class ModelError(TokenSpeedError):
    """A model cannot be had or read."""


class ModelNotFound(ModelError):
    """No such path, manifest or hub id."""


class CorruptCheckpoint(ModelError):
    """A truncated or damaged file, a wrong hash, a missing or misshapen tensor."""


class UnsupportedModel(ModelError):
    """An architecture or a quantisation that no code here handles."""


class PlacementError(ModelError):
    """A module's equations or boundary do not fit how the data it gets lies over the ranks."""


class WorkloadError(TokenSpeedError):
    """A trace of requests cannot be read: not there, malformed, out of range."""


class MeasurementError(TokenSpeedError):
    """A server that is measured is not there, fails, or went away."""


class KernelError(TokenSpeedError):
    """No kernel fits the request, or a forced one cannot run here."""


class RequestError(TokenSpeedError):
    """The request is wrong; the engine goes on."""


class InvalidParameter(RequestError):
    """A sampling parameter outside its range."""


class ContextOverflow(RequestError):
    """The prompt leaves no room in the model's context."""


class Overloaded(RequestError):
    """Refused for load.

    Attributes:
        retry_after_s: seconds after which a retry is likely to be taken.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(TokenSpeedError):
    """The engine failed while it served."""


class EngineDead(EngineError):
    """The engine process is gone."""
