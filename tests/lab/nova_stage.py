"""
One server on a host: what nova-compute does with it, Nova's record of it, and what the agent makes of its root disks.
"""

import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import libvirt
from tests.lab import guest
from tests.lab.agent import wait_until
from tests.lab.fake_nova import FakeNova, Server
from tests.lab.instances import Disks, Image, Instance, Step
from tests.lab.nova_host import LONGER_THAN_QUIET_S, Host, wait_slowly
from tests.lab.nova_servers import HOST

TERMINATED: Final = "terminated"
ALIVE: Final = "alive"
MOVED: Final = "moved"
REPLACED: Final = "replaced"
UNDECIDED: Final = "undecided"

_TABLE_OFFSET: Final = 64


def pause() -> None:
    """Whoever goes by time alone has decided by now."""
    time.sleep(LONGER_THAN_QUIET_S)


@dataclass(frozen=True)
class Disk:
    """
    A root disk, and the files that were made with it.

    The number of its inode comes again once it is gone: what is said of it is said after *since_s*.
    """

    inode: int
    since_s: float
    inodes: tuple[int, ...] = ()  # all of them, as they are watched
    sha256: Mapping[str, str] = field(default_factory=dict)  # by their names


@dataclass
class Play:
    """
    One server's life. Its root disks are in `disks`, in the order in which they were made.

    `during` is called at a step of an operation: there Nova's record changes, or somebody takes his time.
    """

    host: Host
    name: str
    disks: list[Disk] = field(default_factory=list)
    instance: str = ""
    during: dict[Step, Callable[[Instance], object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compute = self.host.compute()
        self.compute.on_step = self._at_step

    def _at_step(self, step: Step, instance: Instance) -> None:
        if step in self.during:
            self.during[step](instance)

    @property
    def nova(self) -> FakeNova:
        return self.host.nova

    # ---- what nova-compute does, and Nova's record of it --------------------------------------------------

    def record(self, **what: Any) -> None:
        """Nova saves this of the server."""
        self.nova.change(self.instance, **what)

    def tasks(self, *states: str | None, each_s: float = 0.0) -> None:
        for state in states:
            self.record(task_state=state)
            time.sleep(each_s)

    def register(self, *, name: str = "", host: str | None = HOST) -> Image:
        """Nova has a new server, and is building it. The image to build it from."""
        image = Image(mode=guest.Mode.IDLE)
        _build_light_base(self.compute.instances_path / "_base" / image.base_name, image)
        server = Server(
            name=name or f"vm-{self.name}", host=host, vm_state="building", task_state="spawning", launched_at_s=None,
            image=image.id, metadata={"team": "a"},
        )  # fmt: skip
        self.instance = self.nova.put(server).uuid
        return image

    def boot(self, *, name: str = "", disks: Disks | None = None) -> Instance:
        """A server that runs, whose guest has written and rests, and whom the agent knows."""
        image = self.register(name=name)
        name = self.nova.server(self.instance).name
        instance = self.compute.spawn(name=name, image=image, uuid=self.instance, disks=disks)
        self.record(vm_state="active", task_state=None, launched_at_s=time.time())
        self.settle(instance)
        return instance

    def settle(self, instance: Instance) -> None:
        """
        Its guest has written, all of it is in the file, and the agent holds the disks; from now on they are watched.

        QEMU writes its tables out when a guest is paused: otherwise it would at its end.
        """
        self._let_write(instance)
        self._watch_base(instance)
        guarded = {}
        for path in sorted(instance.folder.glob("disk*")):
            if path.name == "disk.info":
                continue
            claim = self._claim(path.stat().st_ino, path.name)
            named = (instance.resize_folder / path.name, instance.del_folder / path.name)
            guarded[path.name] = self.host.watch.guard(path, named=named, held=(claim,))
            wait_until(claim.exists, words=f"{self.name}: a claim")
        self.disks.append(
            Disk(
                inode=guarded["disk"].inode,
                since_s=time.time(),
                inodes=tuple(one.inode for one in guarded.values()),
                sha256={name: one.sha256 for name, one in guarded.items()},
            )
        )
        assert wait_slowly(self._is_known), f"{self.name}: the agent does not know it"

    @contextmanager
    def guest_boots(self, instance: Instance) -> Iterator[None]:
        """Its guest starts anew in here, on the disk that it had first."""
        inode = self.disks[0].inode
        self.host.watch.guest_writes(inode)
        yield
        self._let_write(instance)
        self.host.watch.guest_rests(inode)

    def nova_takes(self, disk: Disk) -> None:
        """Nova is about to unlink it."""
        for inode in disk.inodes:
            self.host.watch.nova_takes(inode)

    def release(self, disk: Disk) -> None:
        """Nova has unlinked it, and nobody has it open."""
        for inode in disk.inodes:
            self.host.watch.release(inode)

    @contextmanager
    def nova_drops(self, disk: Disk | None = None) -> Iterator[None]:
        """In here Nova unlinks it (or else the newest), and nobody has it open at the end."""
        self.nova_takes(disk or self.disks[-1])
        yield
        self.release(disk or self.disks[-1])

    def terminate(self, instance: Instance) -> None:
        """What nova-compute does for a delete, up to the undefine. A resize is confirmed first."""
        if instance.resize_folder.exists():
            with self.nova_drops(self.disks[-2]):
                self.compute.confirm_resize(instance)
        with self.nova_drops():
            self.compute.terminate(instance)

    def note_unwritten(self, instance: Instance) -> None:
        """A disk that nobody has written to; return when the agent holds it."""
        inode = instance.disk.stat().st_ino
        self.disks.append(Disk(inode, time.time()))
        wait_until(self._claim(inode).exists, words=f"{self.name}: a claim")

    def _claim(self, inode: int, name: str = "disk") -> Path:
        return self.host.agent.spool / "claims" / f"{self.instance}.{name}.{inode}"

    def _watch_base(self, instance: Instance) -> None:
        base = self.compute.base(instance.image)
        if not self.host.watch.is_guarded(base.stat().st_ino):
            self.host.watch.guard(base)

    def _let_write(self, instance: Instance) -> None:
        self.compute.wait_for(instance)
        domain = self.compute.domain(instance)
        domain.suspend()
        domain.resume()

    def _is_known(self) -> bool:
        """The agent has looked since the newest disk was the domain's; a busy one takes its time."""
        try:
            known = json.loads((self.host.agent.spool / "instances" / f"{self.instance}.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(known["domain_xml"]) and known["root_inode"] == self.disks[-1].inode

    # ---- what the agent makes of it -----------------------------------------------------------------------

    def waits(self) -> str:
        """Why the agent has no verdict yet; empty if it does not wait."""
        return next((str(one["reason"]) for one in self.host.undecided() if one["instance"] == self.instance), "")

    def wait_undecided(self, *, for_s: float = 0.0) -> None:
        """The agent waits, and goes on waiting."""
        assert wait_slowly(self.waits), f"{self.name}: the agent does not wait"
        deadline_s = time.monotonic() + for_s
        while time.monotonic() < deadline_s:
            time.sleep(0.5)
            assert self.waits(), f"{self.name}: the agent waits no more: {self.reached(self.disks[-1])}"

    def assert_open(self) -> None:
        """Nova has not ended its work: whatever is said of the newest disk now is said too early."""
        line = self.reached(self.disks[-1])
        assert line is None, f"{self.name}: too early: {line}"

    def reached(self, disk: Disk) -> dict[str, Any] | None:
        """The agent's log line of its verdict on a disk."""
        until_s = min((one.since_s for one in self.disks if one.since_s > disk.since_s), default=float("inf"))
        for line in self.host.log.events("verdict.reached", self.instance):
            said_s = datetime.fromisoformat(line["timestamp"]).timestamp()
            is_recycled = said_s > until_s and any(one.inode == disk.inode for one in self.disks if one is not disk)
            if line["inode"] == disk.inode and said_s > disk.since_s and not is_recycled:
                return line
        return None

    def is_decided(self, disk: Disk) -> bool:
        return self.word(disk) != UNDECIDED

    def word(self, disk: Disk) -> str:
        """The verdict on a disk, as it is now."""
        line = self.reached(disk)
        if line is not None:
            return str(line["verdict"])
        claim = self._claim(disk.inode)
        if not claim.exists():
            return "its claim is gone"
        if self.waits():
            return UNDECIDED
        return ALIVE if self._runs() else "its domain does not run"

    def receipt(self, disk: Disk) -> dict[str, Any] | None:
        """Of the job that captured this disk."""
        for one in self.host.agent.receipts():
            inodes = [file["inode"] for file in one["captured"] if file["disk"] == "disk"]
            if one["instance"] == self.instance and disk.inode in inodes and one["terminated_at_s"] > disk.since_s:
                return one
        return None

    def lost(self, disk: Disk) -> list[str]:
        """Its files that are in no backup as they were last. Those of one end of a resize may be in the other's."""
        receipts = [one for one in self.host.agent.receipts() if one["instance"] == self.instance]
        sealed = {sha256 for one in receipts for sha256 in one["member_sha256"].values()}
        return sorted(name for name, sha256 in disk.sha256.items() if sha256 not in sealed)

    def _runs(self) -> bool:
        try:
            return bool(self.compute.connection.lookupByUUIDString(self.instance).isActive())
        except libvirt.libvirtError:
            return False


def _build_light_base(path: Path, image: Image) -> None:
    """A base whose guest writes a little, here and there: all of it is a second of a CPU that 50 boots share."""
    path.parent.mkdir(exist_ok=True)
    guest.build_base(path, seed=image.seed, mode=image.mode)
    places = guest.regions()[-4:]
    table = b"".join(struct.pack("<II", at // guest.SECTOR_BYTES, size // guest.BLOCK_BYTES) for at, size in places)
    with path.open("r+b") as base:
        base.seek(guest.SECTOR_BYTES + _TABLE_OFFSET)  # as guest.S and guest.py have it; it ends by a zero
        base.write(table + bytes(8))
