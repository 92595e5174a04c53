"""
`list`, `show`, `verify`, `restore`: what the stores hold. These talk to the stores themselves, not to the agent, so
they work on any machine that has a store at hand and the key: `--from FOLDER --keyfile FILE` and `--cloud NAME` need
no configuration.
"""

import asyncio
import functools
import re
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from autobackup.config import DEFAULT_PATH, OpenstackSection
from autobackup.configfile import load
from autobackup.container.header import HEADER_BYTES, Header, decode
from autobackup.errors import AutobackupError, Damaged, RecordDamaged, Refused, StoreRefused, Transient
from autobackup.flows.restore import restore as restore_flow
from autobackup.flows.verify import SealedObject, open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.service.cli.output import as_time, format_option, progress, show_one, show_rows
from autobackup.stores import OpenDestination, Store, Stored, open_destination
from autobackup.stores.opening import is_private_key
from autobackup.terms import Destination
from autobackup.units import format_bytes

_Result = TypeVar("_Result")
_Command = TypeVar("_Command", bound=Callable[..., Any])
_NOT_IN_A_NAME = re.compile("[^A-Za-z0-9._-]")
_UUID_LENGTH = 36
_WHO_COULD = {
    "none": "sealed under a published key: anybody could have read it, and anybody could have made it",
    "recipient": "sealed to public keys: whoever has those could have made it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """One object, and where it was found."""

    place: OpenDestination
    stored: Stored


def _where(command: _Command) -> _Command:
    command = click.option(
        "--keyfile", "keyfiles", multiple=True, type=click.Path(path_type=Path),
        help="What opens it: a key file, or a recipient's private key.",
    )(command)  # fmt: skip
    command = click.option("--project", default="", help="With --cloud: its name or id, if the entry names none.")(
        command
    )
    command = click.option(
        "--cloud", default="", help="An entry of clouds.yaml: its Glance and Barbican, with that user's rights."
    )(command)
    command = click.option(
        "--from", "folder", type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="A folder of sealed bundles, instead of the configured destinations.",
    )(command)  # fmt: skip
    command = click.option(
        "--config", type=click.Path(path_type=Path), default=DEFAULT_PATH, show_default=True, help="The agent's file."
    )(command)

    @functools.wraps(command)
    def with_places(config: Path, folder: Path | None, cloud: str, project: str, keyfiles: tuple[Path, ...],
                    **rest: object) -> object:  # fmt: skip
        return command(places=_places(config, folder, cloud, project, keyfiles), **rest)

    return cast(_Command, with_places)


@click.command("list")
@click.option("--instance", help="Only backups of this instance (uuid).")
@_where
@format_option
def list_command(instance: str | None, places: list[OpenDestination], fmt: str) -> None:
    """List the backups in every destination."""

    unwell: list[AutobackupError] = []

    async def collect() -> list[_Found]:
        return await _all(places, unwell)

    rows = [_row(found) for found in _run(collect)]
    rows = [row for row in rows if instance in (None, row["instance"])]
    columns = ("backup", "instance", "name", "destination", "created", "expires", "size")
    if rows or not unwell:
        show_rows(rows, columns=columns, fmt=fmt, empty="No backups.")
    if unwell:
        raise type(unwell[0])("; ".join(str(error) for error in unwell))


@click.command()
@click.argument("backup")
@_where
@format_option
def show(backup: str, places: list[OpenDestination], fmt: str) -> None:
    """
    Show one BACKUP: its header. Needs no key, and so proves nothing: see `verify`.

    BACKUP is the id that `list` shows, the start of one, or the uuid of an instance with one backup.
    """

    async def look() -> dict[str, object]:
        found = await _find(backup, places)
        header = await found.place.store.read(found.stored.attempt, offset=0, length=HEADER_BYTES)
        return _row(found) | {"header": asdict(decode(header))}

    show_one(_run(look), fmt=fmt)


@click.command()
@click.argument("backup")
@_where
@format_option
def verify(backup: str, places: list[OpenDestination], fmt: str) -> None:
    """
    Read one BACKUP whole and prove it: every segment, every digest, every member. Writes nothing.

    Exit status 4 if a single bit of it is not as it was sealed.
    """

    async def prove() -> dict[str, object]:
        found = await _find(backup, places)
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
            **_key_notes(sealed.header),
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
def restore(backup: str, target: str, places: list[OpenDestination], fmt: str) -> None:
    """
    Restore one BACKUP: its disks, with their chain put together, ready for qemu.

    A qcow2 with a backing file has the new path of it in its header, so its sha256 is not the one in digests.json;
    docs/recover.py gives the bytes as they were.

    The folder appears when everything was proven, or not at all.
    """

    async def bring_back() -> dict[str, object]:
        found = await _find(backup, places)
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
            "key": sealed.header.key["source"],
            "notes": [*restored.notes, *cast(list[str], _key_notes(sealed.header)["notes"])],
        }

    show_one(_run(bring_back), fmt=fmt)


COMMANDS = (list_command, show, verify, restore)


def _places(
    config: Path, folder: Path | None, cloud: str, project: str, keyfiles: tuple[Path, ...]
) -> list[OpenDestination]:
    """Where to look, and with which keys: a folder, a cloud, or every destination of the configuration."""
    if folder is not None and cloud:
        raise click.UsageError("--from and --cloud exclude each other")
    if project and not cloud:
        raise click.UsageError("--project goes with --cloud")
    private = [path for path in keyfiles if is_private_key(str(path))]
    keks = [path for path in keyfiles if path not in private]
    openstack = OpenstackSection()
    if folder is not None or cloud:
        destination = Destination(
            name=_NOT_IN_A_NAME.sub("-", folder.name if folder else cloud).strip("-._") or "store",
            store="glance" if cloud else "directory",
            path=folder,
            cloud=cloud,
            project=project,
            key="keyfile" if keks else "none",  # for opening, which goes by the header
            keyfile=keks[0] if keks else None,
            older_keyfiles=tuple(keks[1:]),
        )
        destinations: tuple[Destination, ...] = (destination,)
    else:
        read = load(config)
        openstack = read.openstack
        destinations = tuple(
            replace(one, older_keyfiles=(*one.older_keyfiles, *keks))
            for one in read.destination
            if one.name != read.only_asked_for
        )
    return [open_destination(one, openstack, private_keys=[str(path) for path in private]) for one in destinations]


async def _all(places: list[OpenDestination], unwell: list[AutobackupError]) -> list[_Found]:
    """What every destination holds; one that cannot be asked goes to *unwell*, and does not hide the others."""
    found = []
    for place in places:
        try:
            held = [one if one.properties else await _described(place.store, one) for one in await place.store.held()]
        except (Transient, Refused) as exc:
            unwell.append(exc)
            continue
        found += [_Found(place=place, stored=stored) for stored in held]
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


async def _find(backup: str, places: list[OpenDestination]) -> _Found:
    unwell: list[AutobackupError] = []
    direct = await _by_id(backup, places, unwell)  # an image that somebody shared may be in no list of ours
    if direct is not None:
        return direct
    everything = await _all(places, unwell)
    near = [
        one
        for one in everything
        if one.stored.attempt.startswith(backup) or _words(one.stored).get("instance") == backup
    ]
    if not near and unwell:
        raise unwell[0]
    if not near:
        looked_in = ", ".join(place.destination.name for place in places) or "no destination is configured"
        raise Refused(f"no backup {backup!r} (looked in: {looked_in}); autobackup list shows what there is")
    if len(near) > 1:
        listed = ", ".join(f"{one.stored.attempt} in {one.place.destination.name}" for one in near)
        raise Refused(f"{backup!r} is not one backup but {len(near)}; name one of: {listed}")
    return near[0]


async def _by_id(backup: str, places: list[OpenDestination], unwell: list[AutobackupError]) -> _Found | None:
    if len(backup) != _UUID_LENGTH:
        return None
    for place in places:
        try:
            return _Found(place=place, stored=await place.store.stat(AttemptId(backup)))
        except (StoreRefused, RecordDamaged):
            continue  # a listing still finds what describes itself wrongly
        except Transient as exc:
            unwell.append(exc)
    return None


async def _open(found: _Found) -> SealedObject:
    return await open_sealed(found.place.store, found.place.keys, AttemptId(found.stored.attempt), stored=found.stored)


def _row(found: _Found) -> dict[str, object]:
    words = _words(found.stored)
    return {
        "backup": found.stored.attempt,
        "instance": words.get("instance", ""),
        "name": words.get("instance_name", ""),
        "destination": _origin(found, words),
        "created": as_time(words.get("created_at")),
        "expires": as_time(words.get("expires_at")) or ("never" if words else "unknown"),
        "size": format_bytes(found.stored.size_bytes),
        "size_bytes": found.stored.size_bytes,
        "job": words.get("job", ""),
    }


def _origin(found: _Found, words: Mapping[str, str]) -> str:
    """Whose it is, as far as the store knows: what another project shared with us may call itself anything."""
    if found.stored.shared_by:
        return f"shared by project {found.stored.shared_by}"
    return words.get("destination") or found.place.destination.name


def _key_notes(header: Header) -> dict[str, object]:
    """Where the key was from, and what that says of who can have made this."""
    source = header.key["source"]
    return {"key": source, "notes": [_WHO_COULD[source]] if source in _WHO_COULD else []}


def _words(stored: Stored) -> Mapping[str, str]:
    return {key.removeprefix("autobackup_"): value for key, value in stored.properties.items()}


def _run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    async def whole() -> _Result:
        return await work()

    # SIGTERM ends it as Ctrl-C does: what a restore has half written is removed
    signal.signal(signal.SIGTERM, lambda _signo, _frame: signal.raise_signal(signal.SIGINT))
    return asyncio.run(whole())
