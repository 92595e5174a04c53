"""
`list`, `show`, `verify`: what the stores hold, and whether it is whole.
"""

from collections.abc import Mapping
from dataclasses import asdict

import click

from autobackup.container.header import HEADER_BYTES, NO_INSTANCE, Header, decode
from autobackup.container.manifest import Manifest
from autobackup.errors import AutobackupError, Refused
from autobackup.flows.fetch import Origins, kept_at
from autobackup.flows.verify import read_back
from autobackup.flows.workers import Workers
from autobackup.service.cli.finding import Found, everything, find, open_found, run, where, words_of
from autobackup.service.cli.output import as_time, format_option, progress, show_one, show_rows
from autobackup.stores import KIND, KIND_BASE, OpenDestination
from autobackup.units import format_bytes

_WHO_COULD = {
    "none": "sealed under a published key: anybody could have read it, and anybody could have made it",
    "recipient": "sealed to public keys: whoever has those could have made it",
}


@click.command("list")
@click.option("--instance", help="Only backups of this instance (uuid).")
@click.option("--bases", is_flag=True, help="The sealed bases that backups stand on, instead.")
@where()
@format_option
def list_command(*, instance: str | None, bases: bool, places: list[OpenDestination], fmt: str) -> None:
    """List the backups in every destination."""

    unwell: list[AutobackupError] = []

    async def collect() -> list[Found]:
        return await everything(places, unwell)

    rows = [row_of(found) for found in run(collect)]
    rows = [row for row in rows if row["is_base"] is bases and instance in (None, row["instance"])]
    columns = ("backup", "instance", "name", "destination", "created", "expires", "size")
    if rows or not unwell:
        show_rows(rows, columns=columns, fmt=fmt, empty="No backups.")
    if unwell:
        raise type(unwell[0])("; ".join(str(error) for error in unwell))


@click.command()
@click.argument("backup")
@where()
@format_option
def show(backup: str, places: list[OpenDestination], fmt: str) -> None:
    """
    Show one BACKUP: its header. Needs no key, and so proves nothing: see `verify`.

    BACKUP is the id that `list` shows, the start of one, or the uuid of an instance with one backup.
    """

    async def look() -> dict[str, object]:
        found = await find(backup, places)
        header = await found.place.store.read(found.stored.attempt, offset=0, length=HEADER_BYTES)
        return row_of(found) | {"header": asdict(decode(header))}

    show_one(run(look), fmt=fmt)


@click.command()
@click.argument("backup")
@where()
@format_option
def verify(backup: str, places: list[OpenDestination], fmt: str) -> None:
    """
    Read one BACKUP whole and prove it: every segment, every digest, every member. Writes nothing.

    Exit status 4 if a single bit of it is not as it was sealed, 3 if a parent is missing. The parents are looked for,
    not read: `restore` does.
    """

    async def prove() -> dict[str, object]:
        found = await find(backup, places)
        sealed = await open_found(found)
        workers = Workers()
        try:
            with progress("verifying", sealed.size_bytes - HEADER_BYTES) as advance:
                unpacked = await read_back(sealed, workers, progress=advance)
        finally:
            workers.close()
        parents = await _parents(found, sealed.header, unpacked.manifest, places)
        lost = [path for path, kept in parents.items() if not kept]
        if lost:
            raise Refused(f"whole, but what it stands on is nowhere to be had: {', '.join(lost)}")
        return {
            **row_of(found),
            "verified": True,
            "parents": parents,
            **key_notes(sealed.header),
            "members": {name: asdict(digest) for name, digest in unpacked.digests.members.items()},
            "health": [asdict(one) for one in unpacked.digests.health],
            "unreadable": [asdict(one) for one in unpacked.digests.unreadable],
            "not_captured": [asdict(one) for one in unpacked.manifest.not_captured],
        }

    show_one(run(prove), fmt=fmt)


COMMANDS = (list_command, show, verify)


async def _parents(found: Found, header: Header, manifest: Manifest, places: list[OpenDestination]) -> dict[str, str]:
    """Where each parent is kept."""
    origins = Origins(places=[found.place, *(place for place in places if place is not found.place)])
    return {
        parent.path: await kept_at(origins, parent, number, header) for number, parent in enumerate(manifest.parents)
    }


def row_of(found: Found) -> dict[str, object]:
    words = words_of(found.stored)
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
        "parent": words.get("parent", ""),
        "is_base": words.get(KIND.removeprefix("autobackup_")) == KIND_BASE or words.get("instance") == NO_INSTANCE,
    }


def _origin(found: Found, words: Mapping[str, str]) -> str:
    """Whose it is, as far as the store knows: what another project shared with us may call itself anything."""
    if found.stored.shared_by:
        return f"shared by project {found.stored.shared_by}"
    return words.get("destination") or found.place.destination.name


def key_notes(header: Header) -> dict[str, object]:
    """Where the key was from, and what that says of who can have made this."""
    source = header.key["source"]
    return {"key": source, "notes": [_WHO_COULD[source]] if source in _WHO_COULD else []}
