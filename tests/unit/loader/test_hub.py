"""Hub ids, against a stand-in hub on loopback that speaks the part of the API that is used."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.unit.loader import tiny_gguf
from tests.unit.loader.test_sources import Heard
from tokenspeed import loader
from tokenspeed.core.errors import ModelNotFound

COMMIT = "1234567890abcdef1234567890abcdef12345678"
REPO = "someone/tiny-llama"


class Hub:
    """One repository behind a real socket.

    Attributes:
        files: content by path in the repository.
        requested: paths of files that were asked for.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requested: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        headers, content, status = {}, b"", 404
        headers["X-Error-Code"] = "RepoNotFound"
        if path in (f"/api/models/{REPO}", *self._revisions("")):
            entries = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": REPO, "sha": COMMIT, "siblings": entries}).encode()
            status = 200
        elif path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self._etag(data)}
                for name, data in self.files.items()
            ]
            content, status = json.dumps(tree).encode(), 200
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name in self.files:
                self.requested.append(name)
                content, status = self.files[name], 200
                headers["ETag"] = f'"{self._etag(content)}"'
                headers["X-Repo-Commit"] = COMMIT
        elif path.startswith(f"/api/models/{REPO}/"):
            headers["X-Error-Code"] = "RevisionNotFound"
        handler.send_response(status)
        if status != 404:
            headers.pop("X-Error-Code")
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if body:
            handler.wfile.write(content)

    @staticmethod
    def _revisions(rest: str) -> tuple[str, ...]:
        return tuple(f"/api/models/{REPO}/revision/{name}{rest}" for name in ("main", "v2", COMMIT))

    @staticmethod
    def _etag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    source = tiny_gguf.write(
        tmp_path / "a.gguf", tiny_gguf.weights("llama", np.random.default_rng(2))
    )
    hub = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer_config.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": save({"a": torch.arange(4.0)}),
            "pytorch_model.bin": b"\x80\x04.",
            "modeling_tiny.py": b"raise SystemExit",
            "README.md": b"words",
            "onnx/config.json": b"{}",
            "quants/tiny.gguf": source.read_bytes(),
            "quants/other.gguf": b"GGUF",
        }
    )
    yield hub
    hub.close()


def test_configuration_tokenizer_and_safetensors_are_fetched_and_nothing_else(
    hub: Hub, tmp_path: Path
) -> None:
    heard = Heard()
    files = loader.resolve(REPO, cache_dir=tmp_path / "cache", endpoint=hub.url, progress=heard)
    assert (files.kind, files.name) == ("hf", REPO)
    wanted = {"config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in files.path.iterdir()} == wanted
    assert set(hub.requested) == wanted
    weights = dict(loader.open_checkpoint(files).tensors())
    assert torch.equal(weights["a"], torch.arange(4.0))
    size = sum(len(hub.files[name]) for name in wanted)
    assert any(update[1:] == (size, size, "bytes") for update in heard.updates)
    assert any(update[1:] == (4, 4, "files") for update in heard.updates)


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    first = loader.resolve(REPO, cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.requested.clear()
    assert loader.resolve(REPO, cache_dir=tmp_path / "cache", endpoint=hub.url) == first
    assert hub.requested == []


def test_a_revision_can_be_named(hub: Hub, tmp_path: Path) -> None:
    files = loader.resolve(f"{REPO}@v2", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert files.path.name == COMMIT
    with pytest.raises(ModelNotFound, match="cannot download"):
        loader.resolve(f"{REPO}@v3", cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_one_gguf_file_of_a_repository_can_be_named(hub: Hub, tmp_path: Path) -> None:
    model = f"{REPO}/quants/tiny.gguf"
    files = loader.resolve(model, cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert (files.kind, files.name) == ("gguf", model)
    assert set(hub.requested) == {"quants/tiny.gguf"}
    assert loader.open_checkpoint(files).tensor_count == 20


def test_an_absent_model_and_an_absent_file_are_not_found(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="someone/else"):
        loader.resolve("someone/else", cache_dir=tmp_path / "cache", endpoint=hub.url)
    with pytest.raises(ModelNotFound, match=r"has no no\.gguf"):
        loader.resolve(f"{REPO}/no.gguf", cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_a_hub_that_does_not_answer_is_not_found(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot download"):
        loader.resolve(REPO, cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:9")
