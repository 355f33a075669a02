"""The routes of the operations port."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tokenspeed import __version__
from tokenspeed.entrypoint.operations.chat import ChatProxy
from tokenspeed.entrypoint.operations.guard import Guard
from tokenspeed.entrypoint.operations.metrics import Metrics
from tokenspeed.entrypoint.operations.monitor import Monitor
from tokenspeed.entrypoint.operations.page import Page
from tokenspeed.entrypoint.operations.records import RequestBook, RequestRecord
from tokenspeed.entrypoint.operations.timeline import ended_view, live_view

if TYPE_CHECKING:
    from tokenspeed.engine.facts import EngineInfo
    from tokenspeed.entrypoint.servicer import Servicer

__all__ = ["Operations", "guarded_app"]

_ENDED_LISTED_MAX = 100


class Operations:
    """Answers the routes. Everything is JSON but `/metrics`.

    Args:
        servicer: the service that is looked at; one of those that share their state.
        book: its requests.
        monitor: its engines.
        metrics: what Prometheus reads.
    """

    def __init__(
        self, servicer: "Servicer", book: RequestBook, monitor: Monitor, metrics: Metrics
    ) -> None:
        self._servicer = servicer
        self._book = book
        self._monitor = monitor
        self._metrics = metrics

    def routes(self, *, page: Page, chat: ChatProxy) -> list[Route]:
        """Path, method and handler of each."""
        return [
            _get("/", page.page),
            Route("/chat", chat.chat, methods=["POST"]),
            _get("/health", self.health),
            _get("/ready", self.ready),
            _get("/metrics", self.metrics),
            _get("/status", self.status),
            _get("/sessions", self.sessions),
            _get("/cache", self.cache),
            _get("/requests", self.requests),
            _get("/requests/{request_id:path}", self.request),
            Route("/drain", self.drain, methods=["POST"]),
            Route("/resume", self.resume, methods=["POST"]),
        ]

    async def health(self, request: Request) -> Response:
        """200 while all engines get on or have nothing to do, else 503; a drain is healthy."""
        health = self._monitor.health()
        return JSONResponse(
            {
                "status": "healthy" if health.healthy else "unhealthy",
                "reason": health.reason,
                "stalled_s": round(health.stalled_s, 1),
                "draining": self._servicer.draining,
            },
            status_code=200 if health.healthy else 503,
        )

    async def ready(self, request: Request) -> Response:
        """200 while a new request would be taken, else 503."""
        health = self._monitor.health()
        able = self._monitor.able
        is_ready = able and not self._servicer.draining
        reason = "draining" if able and not is_ready else health.reason
        return JSONResponse(
            {"status": "ready" if is_ready else "not ready", "reason": reason},
            status_code=200 if is_ready else 503,
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        stats = await self._monitor.stats()
        text = self._metrics.text(
            info=self._monitor.info,
            stats=stats,
            history=self._servicer.history,
            healthy=self._monitor.health().healthy,
            draining=self._servicer.draining,
        )
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def status(self, request: Request) -> Response:
        """The engine at a glance, and its last minutes."""
        stats = await self._monitor.stats()
        info = self._monitor.info
        health = self._monitor.health()
        return JSONResponse(
            {
                "version": __version__,
                "health": asdict(health),
                "draining": self._servicer.draining,
                "in_flight": self._servicer.running,
                "engine": None if info is None else _engine_view(info),
                "stats": None if stats is None else msgspec.to_builtins(stats),
                "history": [asdict(sample) for sample in self._monitor.samples],
            }
        )

    async def sessions(self, request: Request) -> Response:
        """Conversations, and the requests of each that run now."""
        self._book.settle()
        known = await self._monitor.live_requests()
        running: dict[int | None, list[dict[str, object]]] = {}
        for record in self._book.live():
            running.setdefault(record.session, []).append(live_view(record, known))
        views = [
            {**asdict(view), "running": running.get(view.session, [])}
            for view in self._book.sessions()
        ]
        return JSONResponse(
            {"floor_tokens_per_s": _floor_of(self._monitor.info), "sessions": views}
        )

    async def cache(self, request: Request) -> Response:
        """Pages by tier and state, hits, and why the rest missed."""
        stats = await self._monitor.stats()
        info = self._monitor.info
        if stats is None or info is None:
            raise HTTPException(503, self._monitor.health().reason)
        return JSONResponse(
            {
                "page_tokens": info.page_size,
                "kv_bytes": info.kv_size_bytes,
                "device": {
                    "total": stats.pages_total,
                    "free": stats.pages_free,
                    "cached": stats.pages_cached,
                    "active": stats.pages_active,
                },
                "host": {
                    "total": stats.host_pages_total,
                    "free": stats.host_pages_total - stats.host_pages_cached,
                    "cached": stats.host_pages_cached,
                },
                "tokens": {
                    "prompt": stats.prompt_tokens,
                    "cached": stats.cached_tokens,
                    "missed_evicted": stats.missed_evicted_tokens,
                    "missed_unseen": stats.missed_unseen_tokens,
                    "missed_other_salt": stats.missed_other_salt_tokens,
                    "missed_tail": stats.missed_tail_tokens,
                },
                "evictions": stats.evictions,
                "stores": stats.stores,
                "loads": stats.loads,
            }
        )

    async def requests(self, request: Request) -> Response:
        """Requests that run, and the last that ended, the latest first."""
        self._book.settle()
        known = await self._monitor.live_requests()
        return JSONResponse(
            {
                "running": [live_view(record, known) for record in self._book.live()],
                "ended": [ended_view(ended) for ended in self._book.ended()[:_ENDED_LISTED_MAX]],
            }
        )

    async def request(self, request: Request) -> Response:
        """One request, by the gateway's id or by what its client sent as `x-request-id`."""
        self._book.settle()
        found = self._book.find(request.path_params["request_id"])
        if found is None:
            raise HTTPException(404, "no such request runs, or ended of late")
        if isinstance(found, RequestRecord):
            return JSONResponse(live_view(found, await self._monitor.live_requests()))
        return JSONResponse(ended_view(found))

    async def drain(self, request: Request) -> Response:
        """Refuse new requests; those that run go on to their end."""
        self._servicer.draining = True
        return JSONResponse({"draining": True, "in_flight": self._servicer.running})

    async def resume(self, request: Request) -> Response:
        """Take new requests again, unless the server is going down."""
        if self._servicer.ending:
            raise HTTPException(409, "the server is going down")
        self._servicer.draining = False
        return JSONResponse({"draining": False, "in_flight": self._servicer.running})


def guarded_app(routes: list[Route], *, api_key: str | None, loopback_only: bool) -> Guard:
    """The ASGI application of these routes behind its guard."""
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    return Guard(app, api_key=api_key, loopback_only=loopback_only)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        {"error": error.detail}, status_code=error.status_code, headers=error.headers
    )


def _floor_of(info: "EngineInfo | None") -> float | None:
    """The floor of a short context: what was asked for, or 90% of what one user alone gets."""
    if info is None or info.tps_floor is None:
        return None
    alone = info.tps_alone
    return info.tps_floor if alone is None else round(min(info.tps_floor, 0.9 * alone), 2)


def _get(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, handler, methods=["GET"])


def _engine_view(info: "EngineInfo") -> dict[str, object]:
    """What the page shows of an engine: no paths of this machine."""
    names = (
        *("model_name", "architecture", "quantisation", "dtype", "context_max", "pages"),
        *("page_size", "slots_max", "step_tokens_max", "overlap_depth", "weights_size_bytes"),
        *("kv_size_bytes", "tps_floor", "tps_alone"),
    )
    return {name: getattr(info, name) for name in names}
