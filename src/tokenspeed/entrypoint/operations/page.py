"""The dashboard: one file, and what it is allowed to do."""

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Page"]

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """Serves the dashboard. Its policy names the digests of its own script and style, so that a
    browser runs nothing else, whatever text a request brought."""

    def __init__(self) -> None:
        self._html = resources.files(__package__).joinpath("dashboard.html").read_text("utf-8")
        digests: dict[str, list[str]] = {"script": [], "style": []}
        for kind, text in _INLINE.findall(self._html):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            digests[kind].append(f"'sha256-{digest}'")
        self._headers = {
            "content-security-policy": "; ".join(
                (
                    "default-src 'none'",
                    f"script-src {' '.join(digests['script'])}",
                    f"style-src {' '.join(digests['style'])}",
                    "connect-src 'self'",
                    "img-src data:",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                    "require-trusted-types-for 'script'",
                    "trusted-types 'none'",
                )
            )
        }

    async def page(self, request: Request) -> Response:
        """The dashboard's HTML."""
        return Response(self._html, media_type="text/html", headers=self._headers)
