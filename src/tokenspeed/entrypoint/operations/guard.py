"""Who may speak to the operations port, and how much they may say."""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

__all__ = ["HEADERS_SIZE_MAX_BYTES", "Guard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

BODY_SIZE_MAX_BYTES = 1024 * 1024
HEADERS_SIZE_MAX_BYTES = 16 * 1024
TARGET_CHARS_MAX = 2048
# Anyone may ask whether the server lives, and have the page, which holds no data.
_OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Stands before an ASGI application.

    - A page of the web whose name was made to point at this machine (DNS rebinding) sends that
      name as Host: where the port is bound to loopback, only names of loopback are let in.
    - A page elsewhere may send a browser's POST without asking: one whose Origin is not ours is
      refused.
    - With a key, everything but health and the empty page needs it.
    - Bodies and targets have a greatest size, whatever their length claims to be.

    Args:
        app: what is guarded.
        api_key: what must come as `Authorization: Bearer KEY`; None lets everyone in.
        loopback_only: whether the port is bound to loopback or to a Unix socket.
    """

    def __init__(self, app: App, *, api_key: str | None, loopback_only: bool) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._loopback_only = loopback_only

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer what is refused; pass on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, send_guarded)
            return
        await self._app(scope, _bounded(receive), send_guarded)

    def _refused(self, scope: MutableMapping[str, Any]) -> JSONResponse | None:
        headers = _headers(scope)
        host = headers.get(b"host", b"").decode("latin-1")
        if self._loopback_only and not _is_loopback_name(host):
            return _error(
                421, f"this port is for this machine only, and {host[:100]!r} is no name of it"
            )
        if scope["method"] not in ("GET", "HEAD") and not _same_origin(headers, host):
            return _error(403, "a page of another origin may not do this")
        too_large = _too_large(scope, headers)
        if too_large is not None:
            return too_large
        if self._api_key is not None and scope["path"] not in _OPEN_PATHS:
            sent = headers.get(b"authorization", b"")
            if not secrets.compare_digest(sent, b"Bearer " + self._api_key):
                refusal = _error(401, "send the server's --api-key as `Authorization: Bearer KEY`")
                refusal.headers["www-authenticate"] = "Bearer"
                return refusal
        return None


def _too_large(scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> JSONResponse | None:
    if len(scope["raw_path"] or b"") + len(scope["query_string"]) > TARGET_CHARS_MAX:
        return _error(414, f"a target has at most {TARGET_CHARS_MAX} characters")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS_SIZE_MAX_BYTES:
        return _error(431, f"headers have at most {HEADERS_SIZE_MAX_BYTES} bytes")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 12 or int(declared) > BODY_SIZE_MAX_BYTES:
        return _error(413, f"a body has at most {BODY_SIZE_MAX_BYTES} bytes")
    return None


def _bounded(receive: Receive) -> Receive:
    """Ends a connection whose body grows past the limit; chunked bodies declare no length."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > BODY_SIZE_MAX_BYTES:
                return {"type": "http.disconnect"}
        return message

    return bounded


def _headers(scope: MutableMapping[str, Any]) -> dict[bytes, bytes]:
    """Headers by name; of one that came more than once, the first."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, value)
    return found


def _same_origin(headers: dict[bytes, bytes], host: str) -> bool:
    """Whether a request comes from a page of this port, or from no browser."""
    site = headers.get(b"sec-fetch-site")
    if site is not None and site not in (b"same-origin", b"none"):
        return False
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin.decode("latin-1")).netloc == host


def _is_loopback_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
        if name is None:
            return False
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
