"""Compiles the gateway's plugin: `make gateway-plugin`, which installs what this needs."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import wasmtime
from wasmtime.component import Component

HERE = Path(__file__).parent
SOURCES = (HERE / "requests.c", HERE / "component.wat")
PLUGIN = HERE.parents[1] / "src" / "tokenspeed" / "entrypoint" / "gateway_requests.wasm"
COMPILE = ["ziglang", "cc", "--target=wasm32-freestanding", "-std=c2x", "-Os", "-nostdlib"]
CHECK = ["-Wall", "-Wextra", "-Werror"]
LINK = ["-mbulk-memory", "-Wl,--no-entry", "-Wl,--strip-all"]
# A component begins with eight bytes of its own; kinds of sections.
_FIRST_SECTION, _CUSTOM, _CORE_MODULE = 8, 0, 1


def compiled(source: Path) -> bytes:
    """The core module of a C file."""
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "core.wasm"
        command = [sys.executable, "-m", *COMPILE, *CHECK, *LINK, "-o", str(module), str(source)]
        subprocess.run(command, check=True)
        return module.read_bytes()


def size_at(binary: bytes, at: int) -> tuple[int, int]:
    """A number in LEB128, and where it ends."""
    value = shift = 0
    while True:
        value |= (binary[at] & 0x7F) << shift
        shift += 7
        at += 1
        if binary[at - 1] < 0x80:
            return value, at


def size_bytes(value: int) -> bytes:
    """A number as LEB128."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def section(kind: int, content: bytes) -> bytes:
    """A section of a component."""
    return bytes([kind]) + size_bytes(len(content)) + content


def main() -> None:
    """Puts the compiled module in the place of the component's first section, and adds a section
    that names the sources by their digest."""
    source, interface = SOURCES
    component = bytes(wasmtime.wat2wasm(interface.read_text()))
    assert component[_FIRST_SECTION] == _CORE_MODULE
    size, begin = size_at(component, _FIRST_SECTION + 1)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest().encode()
    plugin = b"".join(
        (
            component[:_FIRST_SECTION],
            section(_CORE_MODULE, compiled(source)),
            component[begin + size :],
            section(_CUSTOM, size_bytes(len(b"sources")) + b"sources" + digest),
        )
    )
    # Raises if it is no valid component.
    Component(wasmtime.Engine(), plugin)
    PLUGIN.write_bytes(plugin)
    print(f"{PLUGIN.name}: {len(plugin)} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
