"""
What a crash test or a test of bad input asks afterwards: are exactly the right bytes in the store, once, is the
disk gone, is the spool empty. Asked of the files themselves, never of the agent.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tests.crash.mortal_agent import MORTAL, install_scrub_method
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.guest_view import Format
from tests.lab.instances import Compute, Disks, Instance

from autobackup.config import OpenstackSection
from autobackup.flows.unpack import Unpacked
from autobackup.flows.verify import open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.stores import BASE, KIND, KIND_BASE, PARENTS, OpenDestination
from autobackup.stores.opening import open_destination
from autobackup.terms import Destination

MiB = 1 << 20
REPOSITORY = Path(__file__).parents[2]
PLAIN = [sys.executable, "-m", "autobackup.service"]
QUICK = '[capture]\nquiet_period = "1s"\nleaked_after = "1s"\nscan_interval = "1s"\n'
SKELETON = {"lock", "host", "agent", "reserve", "claims", "bases", "instances", "jobs", "receipts"}


def quicken(agent: AgentProcess, more: str = "") -> AgentProcess:
    """Shorter waits than the lab's, where a test is not about them; *more* is appended to the configuration."""
    folder = agent.home / "conf.d"
    folder.mkdir(exist_ok=True)
    (folder / "quick.toml").write_text(QUICK)
    (folder / "zz-more.toml").write_text(more)
    return agent


def mortal(*fates: str, site: Path | None = None) -> list[str]:
    """The command of an agent with these fates; *site* is put on its PYTHONPATH."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    if site is not None:
        paths.insert(0, str(site))
    environment = [f"{MORTAL}={' '.join(fates)}", f"PYTHONPATH={':'.join(filter(None, paths))}"]
    return ["env", *environment, sys.executable, "-m", "tests.crash.mortal_agent"]


def site_with_scrub_method(home: Path) -> Path:
    site = home / "site"
    if not site.exists():
        install_scrub_method(site)
    return site


# ---- instances ------------------------------------------------------------------------------------------------


def scribble(path: Path, *, disk_format: Format = "qcow2", size_bytes: int = 3 * MiB, at_bytes: int = 0) -> None:
    """Random guest data; through QEMU where the format has a table."""
    data = os.urandom(size_bytes)
    if disk_format == "raw":
        with path.open("r+b") as disk:
            disk.seek(at_bytes)
            disk.write(data)
        return
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as source:
        source.write(data)
        source.flush()
        write = f"write -q -s {source.name} {at_bytes} {size_bytes}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(path)], check=True, capture_output=True)


def spawn_known(compute: Compute, agent: AgentProcess, *, disks: Disks | None = None, **more: Any) -> Instance:
    """An instance with data on its disk, claimed, and known to the agent."""
    instance = compute.spawn(disks=disks, **more)
    scribble(instance.disk, disk_format=instance.disks.root_format)
    wait_until(lambda: agent.claims(instance.uuid), words=f"a claim; log: {agent.log_path}")
    wait_until(lambda: knows(agent, instance), words=f"a record; log: {agent.log_path}")
    return instance


def knows(agent: AgentProcess, instance: Instance) -> bool:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return bool(json.loads((agent.spool / "instances" / f"{instance.uuid}.json").read_text())["domain_xml"])
    return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the agent's life -----------------------------------------------------------------------------------------


def wait_for_death(agent: AgentProcess, *, within_s: float = 40.0) -> None:
    """Return when the agent was killed by its fate."""
    status = agent.wait_for_end(within_s=within_s)
    assert status == -9, f"ended with {status}:\n{agent.log_path.read_text()[-4000:]}"
    agent.process = None


def wait_for_stop(agent: AgentProcess, *, within_s: float = 40.0) -> int:
    """Return the agent's pid when its fate has stopped it."""
    assert agent.process is not None
    pid = agent.process.pid

    def stopped() -> bool:
        assert agent.process is not None
        assert agent.process.poll() is None, agent.log_path.read_text()[-4000:]
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    wait_until(stopped, within_s=within_s, words=f"the agent stops; log: {agent.log_path}")
    return pid


def restart_plain(agent: AgentProcess) -> None:
    agent.command = list(PLAIN)
    agent.start()


# ---- proof ----------------------------------------------------------------------------------------------------


def unseen(_words: str, _total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """How far a restore is, told to nobody."""
    return nullcontext(lambda _count: None)


def opened_folder(folder: Path, keyfile: Path) -> OpenDestination:
    """A destination of the agent's, opened in this process."""
    destination = Destination(name="vault", store="directory", path=folder, key="keyfile", keyfile=keyfile)
    return open_destination(destination, OpenstackSection())


def unpack(agent: AgentProcess, attempt: str, *, store: str = "vault") -> Unpacked:
    """Read one sealed bundle to its end, in this process, with the key from its file."""

    async def read() -> Unpacked:
        workers = Workers()
        try:
            place = opened_folder(agent.stores[store], agent.keyfile)
            sealed = await open_sealed(place.store, place.keys, AttemptId(attempt))
            return await read_back(sealed, workers)
        finally:
            workers.close()

    return asyncio.run(read())


def bundles(agent: AgentProcess, *, store: str = "vault") -> list[str]:
    """
    The attempts of the backups that a store holds; a partial or an orphan in it is an error.

    So is a base twice, a base that nothing stands on, and one that something stands on and that is not there.
    """
    names = set(os.listdir(agent.stores[store]))
    attempts = {name.removesuffix(".autobackup") for name in names if name.endswith(".autobackup")}
    expected = {f"{attempt}{suffix}" for attempt in attempts for suffix in (".autobackup", ".json")}
    assert names == expected, f"orphans or partials in the store: {sorted(names ^ expected)}"
    properties = {one: properties_of(agent, one, store=store) for one in attempts}
    contents = {one: words[BASE] for one, words in properties.items() if words.get(KIND) == KIND_BASE}
    assert len(set(contents.values())) == len(contents), f"a base is there twice: {contents}"
    stood_on = {parent for words in properties.values() for parent in words.get(PARENTS, "").split()}
    assert stood_on == set(contents), f"bases {sorted(contents)}, of which {sorted(stood_on)} are stood on"
    return sorted(attempts - set(contents))


def properties_of(agent: AgentProcess, attempt: str, *, store: str = "vault") -> dict[str, str]:
    metadata = json.loads((agent.stores[store] / f"{attempt}.json").read_text())
    return {str(key): str(value) for key, value in metadata["properties"].items()}


def assert_stands(agent: AgentProcess, attempt: str, *, store: str = "vault") -> None:
    """What a backup stands on is there: each of its parents with the bytes that its manifest says, in a sealed base."""
    held: set[str] = set()
    for parent in properties_of(agent, attempt, store=store).get(PARENTS, "").split():
        held |= {digest.sha256 for digest in unpack(agent, parent, store=store).digests.members.values()}
    for parent_entry in unpack(agent, attempt, store=store).manifest.parents:
        assert parent_entry.sha256 in held, f"{parent_entry.path} is not beside {attempt}"


def left_in_spool(agent: AgentProcess) -> list[str]:
    """Whatever is in the spool beside its skeleton and receipts."""
    left = []
    for folder, folders, files in os.walk(agent.spool):
        for name in (*folders, *files):
            path = Path(folder, name).relative_to(agent.spool)
            if str(path) not in SKELETON and not (path.parent == Path("receipts") and path.suffix == ".json"):
                left.append(str(path))
    return sorted(left)


def assert_spool_empty(agent: AgentProcess) -> None:
    try:
        wait_until(lambda: not left_in_spool(agent), within_s=15)
    except AssertionError:
        raise AssertionError(f"left in the spool: {left_in_spool(agent)}; log: {agent.log_path}") from None


def assert_captured_once(
    agent: AgentProcess, instance: Instance, sha256: str, *, stores: Sequence[str] = ("vault",), empty: bool = True
) -> dict[str, Any]:
    """The last state, byte for byte, once in each store; scrubbed, on the receipt, and nothing left. The receipt."""
    receipt = agent.receipt_of(instance.uuid, within_s=60)
    assert receipt["outcome"] == "verified in every destination, then scrubbed (" + receipt["scrub"]["method"] + ")"
    assert receipt["scrub"]["scrubbed"]
    assert not receipt["scrub"]["still_named"]
    for copy in receipt["copies"]:
        attempt = copy["attempt"]["attempt"]
        held = [one for one in bundles(agent, store=copy["destination"]) if owner(agent, one, copy) == instance.uuid]
        assert held == [attempt], "exactly the attempt on the receipt is in the store"
        assert_stands(agent, attempt, store=copy["destination"])
        unpacked = unpack(agent, attempt, store=copy["destination"])
        assert unpacked.digests.members["disks/disk"].sha256 == sha256
        assert receipt["member_sha256"]["disks/disk"] == sha256
    assert {copy["destination"] for copy in receipt["copies"]} == set(stores)
    assert [one["instance"] for one in agent.receipts()].count(instance.uuid) == 1
    if empty:
        assert_spool_empty(agent)
    return receipt


def owner(agent: AgentProcess, attempt: str, copy: dict[str, Any]) -> str:
    return properties_of(agent, attempt, store=copy["destination"])["autobackup_instance"]
