"""
`restore` and `promote`: a backup, and what it stands on, back as disks here or as an image that boots in a cloud.
"""

from dataclasses import asdict
from functools import partial
from typing import Final, Literal, cast

import click

from autobackup.cloud.glance import Glance
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudUnavailable, NoRole, Refused, StoreUnavailable
from autobackup.flows.fetch import Origins
from autobackup.flows.promote import promote as promote_flow
from autobackup.flows.restore import Restored, RestoredDisk, Wanted
from autobackup.flows.restore import restore as restore_flow
from autobackup.flows.workers import Workers
from autobackup.host.boot import boot as boot_disk
from autobackup.service.cli.backups import key_notes
from autobackup.service.cli.finding import Found, find, open_found, run, where
from autobackup.service.cli.output import format_option, progress, short_format_option, show_one, show_text
from autobackup.stores import OpenDestination

_ROOT: Final = "disk"
_STALL_S: Final = 120.0
_parents_option = click.option(
    "--parent", "parents", multiple=True, type=click.Path(exists=True, dir_okay=False),
    help="A file that may be a parent of it: an image that was downloaded, a base. Known by its digest.",
)  # fmt: skip


@click.command()
@click.argument("backup")
@click.option("--to", "target", required=True, type=click.Path(), help="A folder that does not exist yet.")
@click.option("--disk", "disks", multiple=True, help="Only this disk, and what it stands on; may be repeated.")
@click.option("--flatten", is_flag=True, help="Each disk as one file, without backing files.")
@click.option(
    "--format", "disk_format", type=click.Choice(["qcow2", "raw"]), help="Of flattened disks.  [default: qcow2]"
)
@_parents_option
@click.option("--no-parents", is_flag=True, help="The overlays alone, as they were captured.")
@click.option("--boot", "boots", is_flag=True, help="Start it under QEMU, isolated, and show its console.")
@click.option(
    "--boot-for", "boot_s", type=click.FloatRange(1, 3600), default=60.0, show_default=True, metavar="SECONDS"
)
@click.option("--tcg", "emulates", is_flag=True, help="Emulate the guest's CPU even where KVM is at hand.")
@where()
@short_format_option
def restore(
    *, backup: str, target: str, disks: tuple[str, ...], flatten: bool, disk_format: Literal["qcow2", "raw"] | None,
    parents: tuple[str, ...], no_parents: bool, boots: bool, boot_s: float, emulates: bool,
    places: list[OpenDestination], fmt: str,
) -> None:  # fmt: skip
    """
    Restore one BACKUP: its disks, with their chain put together, ready for qemu.

    Parents are fetched from beside the backup, from Glance, or from --parent, and must have the digests that were
    sealed.

    A qcow2 with a backing file has the new path of it in its header, so its sha256 is not the one in digests.json;
    docs/recover.py gives the bytes as they were.

    The folder appears when everything was proven, or not at all. --boot changes nothing in it.
    """
    if disk_format and not flatten:
        raise click.UsageError("--format goes with --flatten")
    wanted = Wanted(disks=disks, flat=(disk_format or "qcow2") if flatten else None, with_parents=not no_parents)

    async def bring_back() -> dict[str, object]:
        found = await find(backup, places)
        sealed = await open_found(found)
        workers = Workers()
        try:
            restored = await restore_flow(
                sealed, target=target, wanted=wanted, origins=_origins(found, places, parents), workers=workers,
                show=progress,
            )  # fmt: skip
            booted = (
                await workers.blocking(partial(_booted, restored, boot_s, may_use_kvm=not emulates)) if boots else {}
            )
        finally:
            workers.close()
        manifest = restored.unpacked.manifest
        return {
            "backup": found.stored.attempt,
            "instance": manifest.instance,
            "name": manifest.instance_name,
            "target": restored.target,
            "disks": [
                {"path": disk.path, "format": disk.format, "backing": list(disk.chain[1:])} for disk in restored.disks
            ],
            "reattached": restored.reattached,
            "not_captured": [asdict(one) for one in manifest.not_captured],
            "key": sealed.header.key["source"],
            "notes": [*restored.notes, *cast(list[str], key_notes(sealed.header)["notes"])],
            **booted,
        }

    said = run(bring_back)
    console = str(said.get("console", ""))
    show_one(said if fmt == "json" else {key: value for key, value in said.items() if key != "console"}, fmt=fmt)
    if fmt != "json":
        show_text(console.splitlines(), record={}, fmt=fmt)


@click.command()
@click.argument("backup")
@click.option("--project", "target_project", required=True, help="Who may boot it: name or id of the project.")
@click.option("--to-cloud", default="", help="An entry of clouds.yaml, if it is not the backup's own.")
@click.option("--name", default="", help="Of the image.  [default: the instance's name and the disk's]")
@click.option("--disk", default=_ROOT, show_default=True, help="Which disk.")
@_parents_option
@where(project_option="--from-project")
@format_option
def promote(
    backup: str, target_project: str, to_cloud: str, name: str, disk: str, parents: tuple[str, ...],
    places: list[OpenDestination], fmt: str,
) -> None:  # fmt: skip
    """
    Make a bootable image of one BACKUP's disk in a project's Glance. IN CLEAR: whoever may read that image reads it.

    One qcow2 without a backing file, private to the project, with autobackup_origin. It is sent as it is read: nothing
    of it is written on this machine.
    """

    async def bring_over() -> dict[str, object]:
        found = await find(backup, places)
        cloud = to_cloud or found.place.destination.cloud
        if not cloud:
            raise Refused("the backup is in no cloud; name one for the image with --to-cloud ENTRY")
        glance = await _glance_of(found, cloud, target_project)
        sealed = await open_found(found)
        workers = Workers()
        try:
            promoted = await promote_flow(
                sealed, disk=disk, target=glance, name=name, origins=_origins(found, places, parents), workers=workers,
                show=progress,
            )  # fmt: skip
        finally:
            workers.close()
        return {
            "image": promoted.image.id,
            "name": promoted.image.properties.get("name", ""),
            "project": promoted.image.owner,
            "autobackup_origin": sealed.attempt,
            "disk": promoted.disk,
            "virtual_bytes": promoted.virtual_bytes,
            "size_bytes": promoted.image.size_bytes,
            promoted.image.hash_algorithm or "hash": promoted.image.hash_value,
            **key_notes(sealed.header),
        }

    show_one(run(bring_over), fmt=fmt)


COMMANDS = (restore, promote)


def _origins(found: Found, places: list[OpenDestination], parents: tuple[str, ...]) -> Origins:
    return Origins(places=[found.place, *(place for place in places if place is not found.place)], files=parents)


async def _glance_of(found: Found, cloud: str, project: str) -> Glance:
    """Glance, as somebody with a role in *project* sees it."""
    session = ProjectSession(
        cloud=cloud, project=project, project_domain=found.place.destination.project_domain,
        clouds_yaml=found.place.clouds_yaml,
    )  # fmt: skip
    try:
        await session.access()
    except NoRole as exc:
        raise Refused(f"project {project!r}: {exc}") from exc
    except CloudUnavailable as exc:
        raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
    return Glance(session, stall_timeout_s=_STALL_S, reply_timeout_s=_STALL_S * 5)


def _booted(restored: Restored, limit_s: float, *, may_use_kvm: bool) -> dict[str, object]:
    """What QEMU's console says of the root disk, or of the only one. Blocks."""
    disk = _boot_disk(restored)
    booted = boot_disk(
        disk.path, format_name=disk.format, console_limit_s=limit_s, within=restored.target, may_use_kvm=may_use_kvm
    )
    return {"booted": disk.path, **asdict(booted)}


def _boot_disk(restored: Restored) -> RestoredDisk:
    named = {disk.name: disk for disk in restored.disks}
    if _ROOT in named:
        return named[_ROOT]
    if len(named) == 1:
        return next(iter(named.values()))
    raise Refused(f"which disk boots cannot be told from {', '.join(sorted(named))}; name it with --disk")
