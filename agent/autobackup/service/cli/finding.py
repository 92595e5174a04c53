"""
Where backups are looked for, and one of them found: a folder, a cloud by one's own rights, or the destinations.

These talk to the stores themselves, not to the agent, so they work on any machine with a store at hand and the key:
`--from FOLDER --keyfile FILE` and `--cloud NAME` need no configuration.
"""

import asyncio
import functools
import re
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from autobackup.config import DEFAULT_PATH, OpenstackSection
from autobackup.configfile import load
from autobackup.container.header import HEADER_BYTES, decode
from autobackup.errors import AutobackupError, Damaged, RecordDamaged, Refused, StoreRefused, Transient
from autobackup.flows.verify import SealedObject, open_sealed
from autobackup.model import AttemptId
from autobackup.stores import OpenDestination, Store, Stored, open_destination
from autobackup.stores.opening import is_private_key
from autobackup.terms import Destination

_Result = TypeVar("_Result")
_Command = TypeVar("_Command", bound=Callable[..., Any])
_NOT_IN_A_NAME = re.compile("[^A-Za-z0-9._-]")
_UUID_LENGTH = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object, and where it was found."""

    place: OpenDestination
    stored: Stored


def where(*, project_option: str = "--project") -> Callable[[_Command], _Command]:
    """The options that say where to look; the command gets `places`."""
    return functools.partial(_where, project_option=project_option)


def _where(command: _Command, *, project_option: str) -> _Command:
    command = click.option(
        "--keyfile", "keyfiles", multiple=True, type=click.Path(path_type=Path),
        help="What opens it: a key file, or a recipient's private key.",
    )(command)  # fmt: skip
    command = click.option(
        project_option, "project", default="", help="With --cloud: its name or id, if the entry names none."
    )(command)
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


def run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    async def whole() -> _Result:
        return await work()

    # SIGTERM ends it as Ctrl-C does: what a restore has half written is removed
    signal.signal(signal.SIGTERM, lambda _signo, _frame: signal.raise_signal(signal.SIGINT))
    return asyncio.run(whole())


def words_of(stored: Stored) -> Mapping[str, str]:
    """Its properties, without the prefix."""
    return {key.removeprefix("autobackup_"): value for key, value in stored.properties.items()}


def _places(
    config: Path, folder: Path | None, cloud: str, project: str, keyfiles: tuple[Path, ...]
) -> list[OpenDestination]:
    """Where to look, and with which keys: a folder, a cloud, or every destination of the configuration."""
    if folder is not None and cloud:
        raise click.UsageError("--from and --cloud exclude each other")
    if project and not cloud:
        raise click.UsageError("which project to look into goes with --cloud")
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


async def everything(places: list[OpenDestination], unwell: list[AutobackupError]) -> list[Found]:
    """What every destination holds; one that cannot be asked goes to *unwell*, and does not hide the others."""
    found = []
    for place in places:
        try:
            held = [one if one.properties else await _described(place.store, one) for one in await place.store.held()]
        except (Transient, Refused) as exc:
            unwell.append(exc)
            continue
        found += [Found(place=place, stored=stored) for stored in held]
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


async def find(backup: str, places: list[OpenDestination]) -> Found:
    unwell: list[AutobackupError] = []
    direct = await _by_id(backup, places, unwell)  # an image that somebody shared may be in no list of ours
    if direct is not None:
        return direct
    known = await everything(places, unwell)
    near = [
        one for one in known if one.stored.attempt.startswith(backup) or words_of(one.stored).get("instance") == backup
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


async def _by_id(backup: str, places: list[OpenDestination], unwell: list[AutobackupError]) -> Found | None:
    if len(backup) != _UUID_LENGTH:
        return None
    for place in places:
        try:
            return Found(place=place, stored=await place.store.stat(AttemptId(backup)))
        except (StoreRefused, RecordDamaged):
            continue  # a listing still finds what describes itself wrongly
        except Transient as exc:
            unwell.append(exc)
    return None


async def open_found(found: Found) -> SealedObject:
    return await open_sealed(found.place.store, found.place.keys, AttemptId(found.stored.attempt), stored=found.stored)
