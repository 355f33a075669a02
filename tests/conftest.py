"""Real models, fetched once into the user's cache."""

import os

import pytest

from tokenspeed import loader
from tokenspeed.core.environment import let_threads_sleep

# GPU kernels run in Triton's interpreter, which is asked for before anything imports them; on a GPU
# (`make gpu-check`) they are compiled.
if os.environ.get("TOKENSPEED_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

# Tests run beside the servers they start.
let_threads_sleep()


@pytest.fixture(scope="session")
def smollm2() -> loader.ModelFiles:
    """SmolLM2-135M-Instruct in Q4_1."""
    return loader.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def qwen_coder() -> loader.ModelFiles:
    """Qwen2.5-Coder-0.5B-Instruct in Q4_K_M."""
    return loader.resolve("qwen2.5-coder-0.5b")
