"""What a store holds of backups and of the bases that they stand on, by the files themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.flows.material import open_bundle
from tests.flows.rig import Rig

from autobackup.container.header import HEADER_BYTES, decode
from autobackup.container.manifest import Manifest
from autobackup.model import AttemptId, ChainLink, JobRecord
from autobackup.rules.lineage import sealed_hint
from autobackup.stores import BASE
from autobackup.stores.keys import KeyOpener


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """One sealed bundle, whole. *parents*: what its header names, by number."""

    attempt: AttemptId
    manifest: Manifest
    members: Mapping[str, bytes]
    parents: tuple[str | None, ...]


async def opened(rig: Rig, attempt: str, *, keys: KeyOpener | None = None) -> Opened:
    data = (rig.doors["one"].root / f"{attempt}.autobackup").read_bytes()
    header = decode(data[:HEADER_BYTES])
    key = await (keys or rig.keys["one"]).fetch(header.key)
    members, unpacked = open_bundle(data, key)
    numbers = range(len(unpacked.manifest.parents))
    return Opened(
        attempt=AttemptId(attempt),
        manifest=unpacked.manifest,
        members=members,
        parents=tuple(sealed_hint(header.parent, number) for number in numbers),
    )


async def bases(rig: Rig) -> list[str]:
    """Sealed bases, oldest first, retired or not."""
    return [stored.attempt for stored in await rig.doors["one"].list_held() if BASE in stored.properties]


async def backups(rig: Rig) -> list[str]:
    return [stored.attempt for stored in await rig.doors["one"].list_held() if BASE not in stored.properties]


async def standing_on(rig: Rig, backup: str, *, keys: KeyOpener | None = None) -> list[bytes]:
    """The bytes of what *backup* stands on, out of what its header names, in the manifest's order."""
    found = []
    child = await opened(rig, backup, keys=keys)
    for entry, attempt in zip(child.manifest.parents, child.parents, strict=True):
        assert attempt is not None, f"{entry.path} is kept nowhere"
        [content] = [
            data for name, data in (await opened(rig, attempt, keys=keys)).members.items() if name.startswith("bases/")
        ]
        found.append(content)
    return found


async def job_on(rig: Rig, *chain: ChainLink) -> JobRecord:
    """A job whose root disk stands on *chain*."""
    return await rig.new_job({"disk": b"an overlay by its format"}, format_name="qcow2", chain=chain)


async def sealed_job(rig: Rig, *chain: ChainLink) -> str:
    """The backup that a job on *chain* ended in."""
    before = set(await backups(rig))
    record = await job_on(rig, *chain)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job), rig.jobs.get(record.job).last_error
    [new] = set(await backups(rig)) - before
    return new
