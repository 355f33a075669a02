"""TokenSpeed: an LLM inference engine for coding agents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenspeed.core.environment import let_threads_sleep

if TYPE_CHECKING:
    from tokenspeed.core.constraint import StructuredOutputs
    from tokenspeed.core.sampling import SamplingParams
    from tokenspeed.engine.async_llm import AsyncLLM
    from tokenspeed.engine.llm import LLM

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "StructuredOutputs", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "tokenspeed.engine.llm",
    "AsyncLLM": "tokenspeed.engine.async_llm",
    "SamplingParams": "tokenspeed.core.sampling",
    "StructuredOutputs": "tokenspeed.core.constraint",
}


def __getattr__(name: str) -> Any:
    """Import the public classes on first use, so that `import tokenspeed` loads no torch."""
    if name in _HOMES:
        let_threads_sleep()
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tokenspeed' has no attribute {name!r}")
