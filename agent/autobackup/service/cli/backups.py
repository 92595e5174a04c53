"""
`list`, `show`, `verify`, `restore`: what the stores hold. These talk to the stores themselves, not to the agent, so
they work on any machine that has a store at hand and the key: `--from FOLDER --keyfile FILE` needs no configuration.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from autobackup.config import DEFAULT_PATH, Destination, load
from autobackup.container.header import HEADER_BYTES, decode
from autobackup.errors import Damaged, Refused
from autobackup.flows.restore import restore as restore_flow
from autobackup.flows.verify import SealedObject, open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.service.cli.output import as_time, format_option, progress, show_one, show_rows
from autobackup.stores import Store, Stored, open_keys, open_store
from autobackup.units import format_bytes

_Result = TypeVar("_Result")
_Command = TypeVar("_Command", bound=Callable[..., Any])
_NO_KEYFILE = Path("/nonexistent")  # `list` and `show` open nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """One object, and where it was found."""

    destination: Destination
    store: Store
    stored: Stored


def _where(command: _Command) -> _Command:
    command = click.option(
        "--keyfile", "keyfiles", multiple=True, type=click.Path(path_type=Path), help="With --from: the key file(s)."
    )(command)
    command = click.option(
        "--from", "folder", type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="A folder of sealed bundles, instead of the configured destinations.",
    )(command)  # fmt: skip
    return click.option(
        "--config", type=click.Path(path_type=Path), default=DEFAULT_PATH, show_default=True, help="The agent's file."
    )(command)


@click.command("list")
@click.option("--instance", help="Only backups of this instance (uuid).")
@_where
@format_option
def list_command(instance: str | None, config: Path, folder: Path | None, keyfiles: tuple[Path, ...], fmt: str) -> None:
    """List the backups in every destination."""

    async def collect() -> list[_Found]:
        return await _all(_destinations(config, folder, keyfiles))

    rows = [_row(found) for found in _run(collect)]
    rows = [row for row in rows if instance in (None, row["instance"])]
    columns = ("backup", "instance", "name", "destination", "created", "expires", "size")
    show_rows(rows, columns=columns, fmt=fmt, empty="No backups.")


@click.command()
@click.argument("backup")
@_where
@format_option
def show(backup: str, config: Path, folder: Path | None, keyfiles: tuple[Path, ...], fmt: str) -> None:
    """
    Show one BACKUP: its header. Needs no key, and so proves nothing: see `verify`.

    BACKUP is the id that `list` shows, the start of one, or the uuid of an instance with one backup.
    """

    async def look() -> dict[str, object]:
        found = await _find(backup, _destinations(config, folder, keyfiles))
        header = await found.store.read(found.stored.attempt, offset=0, length=HEADER_BYTES)
        return _row(found) | {"header": asdict(decode(header))}

    show_one(_run(look), fmt=fmt)


@click.command()
@click.argument("backup")
@_where
@format_option
def verify(backup: str, config: Path, folder: Path | None, keyfiles: tuple[Path, ...], fmt: str) -> None:
    """
    Read one BACKUP whole and prove it: every segment, every digest, every member. Writes nothing.

    Exit status 4 if a single bit of it is not as it was sealed.
    """

    async def prove() -> dict[str, object]:
        found = await _find(backup, _destinations(config, folder, keyfiles))
        sealed = await _open(found)
        workers = Workers()
        try:
            with progress("verifying", sealed.size_bytes - HEADER_BYTES) as advance:
                unpacked = await read_back(sealed, workers, progress=advance)
        finally:
            workers.close()
        return {
            **_row(found),
            "verified": True,
            "members": {name: asdict(digest) for name, digest in unpacked.digests.members.items()},
            "health": [asdict(one) for one in unpacked.digests.health],
            "unreadable": [asdict(one) for one in unpacked.digests.unreadable],
            "not_captured": [asdict(one) for one in unpacked.manifest.not_captured],
        }

    show_one(_run(prove), fmt=fmt)


@click.command()
@click.argument("backup")
@click.option("--to", "target", required=True, type=click.Path(), help="A folder that does not exist yet.")
@_where
@format_option
def restore(backup: str, target: str, config: Path, folder: Path | None, keyfiles: tuple[Path, ...], fmt: str) -> None:
    """
    Restore one BACKUP: its disks, with their chain put together, ready for qemu.

    A qcow2 with a backing file has the new path of it in its header, so its sha256 is not the one in digests.json;
    docs/recover.py gives the bytes as they were.

    The folder appears when everything was proven, or not at all.
    """

    async def bring_back() -> dict[str, object]:
        found = await _find(backup, _destinations(config, folder, keyfiles))
        sealed = await _open(found)
        workers = Workers()
        try:
            with progress("restoring", sealed.size_bytes - HEADER_BYTES) as advance:
                restored = await restore_flow(sealed, target=target, workers=workers, progress=advance)
        finally:
            workers.close()
        manifest = restored.unpacked.manifest
        return {
            "backup": found.stored.attempt,
            "instance": manifest.instance,
            "name": manifest.instance_name,
            "target": restored.target,
            "disks": [{"path": f"{restored.target}/{disk.member}", "format": disk.format} for disk in manifest.disks],
            "reattached": restored.reattached,
            "not_captured": [asdict(one) for one in manifest.not_captured],
            "notes": restored.notes,
        }

    show_one(_run(bring_back), fmt=fmt)


COMMANDS = (list_command, show, verify, restore)


def _destinations(config: Path, folder: Path | None, keyfiles: tuple[Path, ...]) -> tuple[Destination, ...]:
    if folder is None:
        if keyfiles:
            raise click.UsageError("--keyfile goes with --from")
        return load(config).destination
    first, *older = keyfiles or (_NO_KEYFILE,)
    return (
        Destination(
            name=folder.name or "store", store="directory", path=folder, key="keyfile", keyfile=first,
            older_keyfiles=tuple(older), reserve_bytes=0,
        ),
    )  # fmt: skip


async def _all(destinations: tuple[Destination, ...]) -> list[_Found]:
    found = []
    for destination in destinations:
        store = open_store(destination)
        held = [stored if stored.properties else await _described(store, stored) for stored in await store.held()]
        found += [_Found(destination=destination, store=store, stored=stored) for stored in held]
    return found


async def _described(store: Store, stored: Stored) -> Stored:
    """An object whose metadata was not copied with it, in the words of its own header."""
    try:
        header = decode(await store.read(stored.attempt, offset=0, length=HEADER_BYTES))
    except (Damaged, Refused):
        return stored
    words = {
        "instance": header.instance,
        "job": header.job,
        "created_at": str(header.created_at_s),
        "expires_at": "" if header.expires_at_s is None else str(header.expires_at_s),
    }
    return replace(stored, properties=words)


async def _find(backup: str, destinations: tuple[Destination, ...]) -> _Found:
    everything = await _all(destinations)
    exact = [one for one in everything if one.stored.attempt == backup]
    if exact:
        return exact[0]
    near = [
        one
        for one in everything
        if one.stored.attempt.startswith(backup) or _words(one.stored).get("instance") == backup
    ]
    if not near:
        places = ", ".join(destination.name for destination in destinations) or "no destination is configured"
        raise Refused(f"no backup {backup!r} (looked in: {places}); autobackup list shows what there is")
    if len(near) > 1:
        listed = ", ".join(f"{one.stored.attempt} in {one.destination.name}" for one in near)
        raise Refused(f"{backup!r} is not one backup but {len(near)}; name one of: {listed}")
    return near[0]


async def _open(found: _Found) -> SealedObject:
    if found.destination.keyfile == _NO_KEYFILE:
        raise click.UsageError("--from needs --keyfile FILE here: the key file that this was sealed under")
    return await open_sealed(found.store, open_keys(found.destination), AttemptId(found.stored.attempt))


def _row(found: _Found) -> dict[str, object]:
    words = _words(found.stored)
    return {
        "backup": found.stored.attempt,
        "instance": words.get("instance", ""),
        "name": words.get("instance_name", ""),
        "destination": found.destination.name,
        "created": as_time(words.get("created_at")),
        "expires": as_time(words.get("expires_at")) or ("never" if words else "unknown"),
        "size": format_bytes(found.stored.size_bytes),
        "size_bytes": found.stored.size_bytes,
        "job": words.get("job", ""),
    }


def _words(stored: Stored) -> Mapping[str, str]:
    return {key.removeprefix("autobackup_"): value for key, value in stored.properties.items()}


def _run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    async def whole() -> _Result:
        return await work()

    # SIGTERM ends it as Ctrl-C does: what a restore has half written is removed
    signal.signal(signal.SIGTERM, lambda _signo, _frame: signal.raise_signal(signal.SIGINT))
    return asyncio.run(whole())
