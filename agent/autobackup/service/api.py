"""
The local HTTP socket: health, queue, metrics, owners' requests, and the orders that an operator may give.

    GET  /healthz                       200 while the loop turns; says what is degraded
    GET  /readyz                        200 once claims are held and libvirt answered, 503 before
    GET  /metrics                       Prometheus text
    GET  /v1/status                     one object for the CLI
    GET  /v1/queue                      jobs, and candidates that are not decided yet
    GET  /v1/instances                  what is known of those that are held; the disks' bytes; which rulebook
    POST /v1/queue/{job}/retry          try again now
    POST /v1/queue/{job}/discard        let the last state go; needs {"confirm": "<job>"}
                                        with {"destination": "<name>"}, only that copy
    POST /v1/instances/{uuid}/take      seal what waits undecided, and never overwrite it; needs {"confirm": "<uuid>"}
    POST /v1/instances/{uuid}/let-go    let what waits undecided go; needs {"confirm": "<uuid>"}
    GET, POST, DELETE /v1/link/{parent}/{child}
                                        a parent image or base, and a backup: shown, linked, unlinked; the last link
                                        that goes releases the parent
    GET, POST, DELETE /v1/instances/{uuid}/terminate_backup
                                        the owner's request: {"enabled": true, "store_project": "<id>",
                                        "store_user": "<id>", "retention": "30d"}; with "enabled": false, that
                                        a rule which may be declined is

Access is the socket's mode: root, and the group that the configuration names. Errors are {"error": "..."}.
"""

import asyncio
import grp
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from aiohttp import web

from autobackup.errors import ConfigError, Refused, Transient
from autobackup.flows.capture import Order
from autobackup.flows.jobs import Jobs
from autobackup.flows.links import Links
from autobackup.flows.requests import Requests
from autobackup.metrics import Metrics
from autobackup.model import DestinationName, InstanceId, JobId, JobRecord, Request
from autobackup.rules.wishes import retention_of

_SHUTDOWN_S: Final = 2.0
_REQUEST: Final = "/v1/instances/{uuid}/terminate_backup"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LINK: Final = "/v1/link/{parent}/{child}"
_REQUEST_KEYS: Final = frozenset({"enabled", "store_project", "store_user", "retention"})


JobOrder: TypeAlias = Callable[[JobId, Callable[[JobId], Awaitable[JobRecord]]], Awaitable[JobRecord]]
"""Lets an order act on a job, when nobody works on it: `flows.runner.Runner.order`."""


class Health(Protocol):
    """What the API asks of the rest."""

    def degraded(self) -> list[str]: ...

    def is_ready(self) -> bool: ...

    def undecided(self) -> list[dict[str, object]]: ...

    def status(self) -> dict[str, object]: ...

    def instances(self) -> dict[str, object]: ...

    def order(self, instance: InstanceId, order: Order) -> None: ...


class Api:
    """Serves one unix socket. Build it, then `run`."""

    def __init__(
        self,
        *,
        path: str,
        group: str,
        jobs: Jobs,
        requests: Requests,
        links: Links,
        metrics: Metrics,
        health: Health,
        order: JobOrder,
    ) -> None:
        self._path = path
        self._group = group
        self._jobs = jobs
        self._requests = requests
        self._links = links
        self._metrics = metrics
        self._health = health
        self._order = order

    async def run(self) -> None:
        """Serve until cancelled; the socket is gone afterwards."""
        app = web.Application(middlewares=[_errors])
        app.add_routes([
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._metrics_text),
            web.get("/v1/status", self._status),
            web.get("/v1/queue", self._queue),
            web.get("/v1/instances", self._instances),
            web.post("/v1/queue/{job}/retry", self._retry),
            web.post("/v1/queue/{job}/discard", self._discard),
            *(web.post(f"/v1/instances/{{uuid}}/{order}", partial(self._decide, order)) for order in Order),
            web.get(_LINK, self._show_link),
            web.post(_LINK, self._add_link),
            web.delete(_LINK, self._remove_link),
            web.get(_REQUEST, self._show_request),
            web.post(_REQUEST, self._accept_request),
            web.delete(_REQUEST, self._drop_request),
        ])  # fmt: skip
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        listening = open_socket(self._path, self._group)
        try:
            await runner.setup()
            await web.SockSite(runner, listening).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            listening.close()  # after the site, which must take it off the loop
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    async def _healthz(self, _request: web.Request) -> web.Response:
        degraded = self._health.degraded()
        return web.json_response({"status": "degraded" if degraded else "ok", "degraded": degraded})

    async def _readyz(self, _request: web.Request) -> web.Response:
        ready = self._health.is_ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _metrics_text(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._health.status())

    async def _queue(self, _request: web.Request) -> web.Response:
        now_s = time.time()
        return web.json_response({
            "jobs": [queue_entry(record, now_s) for record in self._jobs.all()],
            "undecided": self._health.undecided(),
        })  # fmt: skip

    async def _instances(self, _request: web.Request) -> web.Response:
        return web.json_response(self._health.instances())

    async def _show_link(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(await self._links.show(*_ends(request))))

    async def _add_link(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(await self._links.add(*_ends(request))))

    async def _remove_link(self, request: web.Request) -> web.Response:
        parent, child = _ends(request)
        released = await self._links.remove(parent, child)
        return web.json_response({"parent": parent, "child": child, "linked": "", "parent_released": released})

    async def _retry(self, request: web.Request) -> web.Response:
        record = await self._order(JobId(request.match_info["job"]), self._jobs.order_retry)
        return web.json_response(queue_entry(record, time.time()))

    async def _discard(self, request: web.Request) -> web.Response:
        job = request.match_info["job"]
        body: Any = await request.json() if request.can_read_body else {}
        if not isinstance(body, dict) or body.get("confirm") != job:
            raise Refused(f'a discard must carry {{"confirm": "{job}"}}: it lets the last state of the instance go')
        order = self._jobs.order_discard
        if destination := str(body.get("destination", "")):
            order = partial(self._jobs.order_discard_of, destination=DestinationName(destination))
        record = await self._order(JobId(job), order)
        return web.json_response(queue_entry(record, time.time()))

    async def _decide(self, order: Order, request: web.Request) -> web.Response:
        instance = request.match_info["uuid"]
        body: Any = await request.json() if request.can_read_body else {}
        if not isinstance(body, dict) or body.get("confirm") != instance:
            raise Refused(f'an order to {order} must carry {{"confirm": "{instance}"}}')
        self._health.order(InstanceId(instance), order)
        return web.json_response({"instance": instance, "ordered": order}, status=202)

    async def _show_request(self, request: web.Request) -> web.Response:
        return web.json_response(_request_entry(self._requests.of(InstanceId(request.match_info["uuid"]))))

    async def _accept_request(self, request: web.Request) -> web.Response:
        instance, wanted = InstanceId(request.match_info["uuid"]), _parsed_request(await request.json())
        return web.json_response(_request_entry(await self._requests.accept(instance, wanted)))

    async def _drop_request(self, request: web.Request) -> web.Response:
        await self._requests.drop(InstanceId(request.match_info["uuid"]))
        return web.json_response(_request_entry(None))


def _request_entry(request: Request | None) -> dict[str, object]:
    if request is None:
        return {"enabled": False}
    return {
        "enabled": request.enabled,
        "source": request.source,
        "refused": request.refused,
        "store_project": request.project,
        "store_user": request.reader,
        "retention_s": request.retention_s,
    }


def _parsed_request(body: object) -> Request:
    """Raises `Refused` with the key that is wrong."""
    if not isinstance(body, dict) or not isinstance(body.get("enabled"), bool):
        raise Refused('a request is {"enabled": true|false, "store_project": …, "store_user": …, "retention": …}')
    unknown = sorted(body.keys() - _REQUEST_KEYS)
    wrong = sorted(key for key in body.keys() - {"enabled"} if not isinstance(body[key], str))
    if unknown or wrong:
        raise Refused(f"unknown keys: {unknown}" if unknown else f"must be strings: {wrong}")
    if not body["enabled"]:
        return Request(enabled=False)
    if not body.get("store_project"):
        raise Refused("store_project is missing: the id of the project that is to own the backup")
    try:
        retention_s = retention_of(body["retention"]) if body.get("retention") else None
    except ValueError as exc:
        raise Refused(f"retention: {exc}") from None
    return Request(project=body["store_project"], reader=body.get("store_user", ""), retention_s=retention_s)


def _ends(request: web.Request) -> tuple[str, str]:
    ends = request.match_info["parent"], request.match_info["child"]
    for one in ends:
        if _UUID.fullmatch(one) is None:
            raise Refused(f"{one!r} is not the id of an image or a backup")
    return ends


def queue_entry(record: JobRecord, now_s: float) -> dict[str, object]:
    """One job as operators see it."""
    return {
        "job": record.job,
        "instance": record.instance,
        "name": record.source.name,
        "state": record.state,
        "age_s": round(now_s - record.created_at_s, 1),
        "next_try_in_s": max(0.0, round(record.not_before_s - now_s, 1)),
        "failures": record.failure_count,
        "last_error": record.last_error,
        "copies": [
            {
                "destination": copy.destination,
                "state": copy.state,
                "failures": copy.failure_count,
                "last_error": copy.last_error,
                "attempt": copy.attempt.attempt if copy.attempt else None,
            }
            for copy in record.copies
        ],
    }


def open_socket(path: str, group: str) -> socket.socket:
    """A listening unix socket, 0600, or 0660 for *group*. A stale one is replaced; a live one is a `ConfigError`."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        old_mask = os.umask(0o177)
        try:
            listening.bind(path)
        finally:
            os.umask(old_mask)
        if group:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
            os.chmod(path, 0o660)
        listening.listen(64)
        listening.setblocking(False)
    except (OSError, KeyError) as exc:
        listening.close()
        raise ConfigError(
            f"api.socket {path}: {exc}; its folder must exist and be writable, its group be known"
        ) from exc
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except (ConnectionRefusedError, TimeoutError):
            os.unlink(path)
            return
    raise ConfigError(f"api.socket {path}: another agent listens there")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as exc:
        return web.json_response({"error": str(exc)}, status=409)
    except Transient as exc:
        return web.json_response({"error": str(exc)}, status=503)
    except ValueError as exc:
        return web.json_response({"error": f"the body is not JSON: {exc}"}, status=400)
    except web.HTTPException as exc:
        return web.json_response({"error": exc.reason}, status=exc.status)
