"""
The way back: whole and proven, or nothing at all; and what the command line says and exits with.

Invariant 7. One real capture is made for the module; each test damages a copy of its own.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.crash.evidence import assert_captured_once, opened_folder, sha256_of, spawn_known, unseen
from tests.crash.scene import Scene
from tests.lab.agent import AgentProcess
from tests.lab.guest_view import guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Disks
from tests.lab.workspace import Workspace

from autobackup.container.header import HEADER_BYTES, decode
from autobackup.container.seal import SEGMENT_BYTES, STREAM_HEADER_BYTES
from autobackup.errors import AutobackupError, Damaged
from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Wanted, restore
from autobackup.flows.verify import open_sealed
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.stores.keyfile import KeyFile, write_kek

MiB = 1 << 20


@dataclass(frozen=True)
class Capture:
    """One proven backup, its agent still running, and what its guest last saw."""

    agent: AgentProcess
    instance: str
    attempt: str
    sha256: str
    view: str
    base_view: str

    @property
    def bundle(self) -> Path:
        return self.agent.stores["vault"] / f"{self.attempt}.autobackup"


@dataclass
class Copy:
    """A copy of the store for one test to damage."""

    store: Path
    keyfile: Path
    attempt: str

    @property
    def bundle(self) -> Path:
        return self.store / f"{self.attempt}.autobackup"

    @property
    def target(self) -> Path:
        return self.store.parent / "restored"

    def cli(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        return run(command, self.attempt, "--from", str(self.store), "--keyfile", str(self.keyfile), *more)

    def restore(self) -> subprocess.CompletedProcess[str]:
        return self.cli("restore", "--to", str(self.target))

    def assert_nothing(self) -> None:
        assert sorted(os.listdir(self.store.parent)) == ["kek", "store"]


@pytest.fixture(scope="module")
def capture(hypervisor: Hypervisor, workspace: Workspace) -> Iterator[Capture]:
    with Scene.open(hypervisor, workspace) as scene:
        agent = scene.agent()
        agent.start()
        instance = spawn_known(scene.compute, agent, disks=Disks(config_drive=True), name="db-1")
        sha256, view = sha256_of(instance.disk), guest_view_sha256(instance.disk, "qcow2")
        base_view = sha256_of(scene.compute.base(instance.image))
        scene.compute.terminate(instance)
        receipt = assert_captured_once(agent, instance, sha256)
        [copy] = receipt["copies"]
        yield Capture(agent, instance.uuid, copy["attempt"]["attempt"], sha256, view, base_view)
        agent.stop()


@pytest.fixture
def copy(capture: Capture, workspace: Workspace) -> Iterator[Copy]:
    place = workspace.folder("copy")
    shutil.copytree(capture.agent.stores["vault"], place / "store")
    (place / "store").chmod(0o700)
    shutil.copy2(capture.agent.keyfile, place / "kek")
    yield Copy(place / "store", place / "kek", capture.attempt)
    shutil.rmtree(place)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobackup.service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- whole ------------------------------------------------------------------------------------------------------


def test_a_restored_chain_shows_what_the_guest_saw(capture: Capture, copy: Copy) -> None:
    done = copy.cli("restore", "--to", str(copy.target), "-f", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)

    disk = copy.target / "disks/disk"
    chain = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--backing-chain", "--output=json", str(disk)], check=True, capture_output=True
        ).stdout
    )
    assert [link["format"] for link in chain] == ["qcow2", "raw"]
    assert Path(chain[1]["filename"]).resolve().is_relative_to(copy.target.resolve())
    assert guest_view_sha256(disk, "qcow2") == capture.view
    [base] = (copy.target / "bases").iterdir()
    assert sha256_of(base) == capture.base_view
    assert answer["notes"] == []
    assert {one["path"] for one in answer["disks"]} == {str(disk), str(copy.target / "disks/disk.config")}
    assert (copy.target.stat().st_mode & 0o777) == 0o700
    assert "<domain" in (copy.target / "domain.xml").read_text()
    # the chain must not depend on where it lies
    moved = copy.target.rename(copy.target.with_name("moved"))
    assert guest_view_sha256(moved / "disks/disk", "qcow2") == capture.view


# ---- not whole --------------------------------------------------------------------------------------------------


def test_the_wrong_key_is_refused(copy: Copy) -> None:
    copy.keyfile.unlink()
    write_kek(str(copy.keyfile))

    done = copy.restore()

    assert done.returncode == 3, done.stderr
    assert "none of the key files at hand is that one" in done.stderr
    copy.assert_nothing()


def test_another_key_under_the_right_name_is_damage(copy: Copy) -> None:
    """The header says which key; one that was edited to name ours is caught by the wrapped key itself."""
    copy.keyfile.unlink()
    name = write_kek(str(copy.keyfile))
    head = copy.bundle.read_bytes()[:HEADER_BYTES]
    words = decode(head).key
    edit(copy.bundle, head.replace(words["kek_id"].encode(), name.encode()))

    done = copy.restore()

    assert done.returncode == 4, done.stderr
    copy.assert_nothing()


def flip_header(path: Path) -> None:
    flip(path, 60)


def flip_first(path: Path) -> None:
    flip(path, HEADER_BYTES + STREAM_HEADER_BYTES + 10)


def flip_last(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def cut_last_segment(path: Path) -> None:
    stream = path.stat().st_size - HEADER_BYTES
    os.truncate(path, HEADER_BYTES + (stream - 1) // SEGMENT_BYTES * SEGMENT_BYTES)


def swap(path: Path) -> None:
    data = path.read_bytes()
    first, second = HEADER_BYTES + SEGMENT_BYTES, HEADER_BYTES + 2 * SEGMENT_BYTES
    path.write_bytes(data[:first] + data[second : second + SEGMENT_BYTES] + data[first:second]
                     + data[second + SEGMENT_BYTES :])  # fmt: skip


@pytest.mark.parametrize("damage", [flip_header, flip_first, flip_last, cut_last_segment, swap])
def test_a_damaged_bundle_exits_4_and_leaves_nothing(copy: Copy, damage: Callable[[Path], None]) -> None:
    damage(copy.bundle)

    with ThreadPoolExecutor(2) as pool:
        verifying = pool.submit(copy.cli, "verify")
        restored, verified = copy.restore(), verifying.result()

    assert restored.returncode == 4, restored.stderr
    assert verified.returncode == 4, verified.stderr
    assert restored.stderr.startswith("autobackup: ")
    assert "Traceback" not in restored.stderr
    copy.assert_nothing()


def test_it_is_refused_wherever_it_is_cut_or_extended(copy: Copy) -> None:
    """Every boundary of the format, and one byte to each side of it."""
    whole = copy.bundle.read_bytes()
    ends = {0, 13, HEADER_BYTES, HEADER_BYTES + STREAM_HEADER_BYTES, len(whole)}
    ends |= set(range(HEADER_BYTES + SEGMENT_BYTES, len(whole), SEGMENT_BYTES))
    lengths = sorted({end + more for end in ends for more in (-1, 0, 1, 16)} - {-1, len(whole)})
    for length in lengths:
        copy.bundle.write_bytes((whole + bytes(64))[:length])
        assert isinstance(failure(copy), Damaged), length
        copy.assert_nothing()


def test_it_is_refused_whichever_region_is_touched(copy: Copy) -> None:
    """A bit in every part: each header byte that says something, the salt, the nonce, each segment's ends and tags."""
    whole = copy.bundle.read_bytes()
    text = len(whole[:HEADER_BYTES].rstrip(b"\0"))
    places = [*range(0, text, 29), text, HEADER_BYTES - 1]
    places += range(HEADER_BYTES, HEADER_BYTES + STREAM_HEADER_BYTES, 7)
    for start in range(HEADER_BYTES, len(whole), SEGMENT_BYTES):
        end = min(start + SEGMENT_BYTES, len(whole))
        places += [start, start + STREAM_HEADER_BYTES, (start + end) // 2, end - 17, end - 16, end - 1]
    for place in places:
        flip(copy.bundle, place)
        error = failure(copy)
        assert isinstance(error, AutobackupError), place
        copy.assert_nothing()
        flip(copy.bundle, place)
    assert copy.bundle.read_bytes() == whole
    assert failure(copy) is None


def test_an_edited_header_is_refused(capture: Capture, copy: Copy) -> None:
    """What the header says (whose it is, when it may be deleted) is sealed with the rest."""
    head = copy.bundle.read_bytes()[:HEADER_BYTES]
    expires = str(decode(head).expires_at_s)
    for old, new in ((expires, str(int(expires) + 1)), (capture.instance, capture.attempt), ("vault", "fault")):
        edit(copy.bundle, head.replace(old.encode(), new.encode()))
        done = copy.restore()
        assert done.returncode == 4, (old, done.stderr)
        copy.assert_nothing()


# ---- the target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a folder", "a file", "a dangling link", "a partial"])
def test_an_existing_target_is_left_alone(copy: Copy, what: str) -> None:
    path = copy.target
    match what:
        case "a folder":
            path.mkdir()
        case "a file":
            path.write_text("mine")
        case "a dangling link":
            path.symlink_to("/nowhere")
        case "a partial":
            path = path.with_name("restored.partial")
            path.mkdir()
    before = sorted(os.listdir(copy.store.parent))

    done = copy.restore()

    assert done.returncode == 3, done.stderr
    assert f"{path}: exists" in done.stderr
    assert sorted(os.listdir(copy.store.parent)) == before


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_restore_leaves_nothing(copy: Copy, signo: signal.Signals) -> None:
    command = [sys.executable, "-m", "autobackup.service.cli", "restore", copy.attempt, "--from", str(copy.store),
               "--keyfile", str(copy.keyfile), "--to", str(copy.target)]  # fmt: skip
    partial = copy.target.with_name("restored.partial")
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not partial.exists() and process.poll() is None:
                time.sleep(0.0005)
            process.send_signal(signo)
            said = process.communicate(timeout=30)[1]
        if process.returncode != 0:
            break
        shutil.rmtree(copy.target)  # it was faster than the signal
    assert process.returncode != 0
    assert b"Traceback" not in said
    copy.assert_nothing()


# ---- what the commands say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["json", "table", "value"])
def test_every_command_speaks_every_format(capture: Capture, fmt: str, tmp_path: Path) -> None:
    config, socket = ["--config", str(capture.agent.config)], ["--socket", str(capture.agent.socket)]
    empty_queue = {"json": '"jobs": []', "table": "No jobs.", "value": ""}[fmt]
    new_key = tmp_path / "new-kek"
    commands = {
        ("list", *config): capture.attempt,
        ("show", capture.attempt, *config): capture.attempt,
        ("verify", capture.attempt[:8], *config): capture.attempt,
        ("status", *socket): "connected",
        ("queue", *socket): empty_queue,
        ("check-config", str(capture.agent.config)): "everything",
        ("keygen", str(new_key)): "new-kek",
    }
    secrets = {capture.agent.keyfile.read_text().strip()}
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda words: run(*words, "-f", fmt), commands))
    secrets.add(new_key.read_text().strip())

    for (command, expected), done in zip(commands.items(), results, strict=True):
        assert done.returncode == 0, (command, done.stderr)
        assert expected in done.stdout, command
        if fmt == "json":
            json.loads(done.stdout)
        assert not [secret for secret in secrets if secret in done.stdout + done.stderr]
    assert new_key.stat().st_mode & 0o777 == 0o600


def test_the_exit_statuses_are_those_of_the_manual(capture: Capture, tmp_path: Path) -> None:
    config = ["--config", str(capture.agent.config)]
    vault = str(capture.agent.stores["vault"])
    expected: dict[tuple[str, ...], int] = {}
    for status, *arguments in (
        (2, "list", "--config", str(tmp_path / "none.toml")),
        (2, "restore", capture.attempt, *config),
        (2, "verify", capture.attempt, "--project", "without-a-cloud", *config),
        (2, "list", "--from", vault, "--cloud", "both"),
        (3, "restore", capture.attempt, "--from", vault, "--to", str(tmp_path / "t")),
        (2, "no-such-command"),
        (3, "show", "no-such-backup", *config),
        (3, "keygen", str(capture.agent.keyfile)),
        (5, "verify", capture.attempt, "--from", vault, "--keyfile", str(tmp_path / "none")),
        (2, "list", "--from", str(tmp_path / "none")),
        (5, "status", "--socket", str(tmp_path / "none.sock")),
        (3, "queue", "--socket", str(capture.agent.socket), "retry", "no-such-job"),
        (2, "queue", "--socket", str(capture.agent.socket), "discard", "no-such-job"),
    ):
        expected[tuple(map(str, arguments))] = status
    with ThreadPoolExecutor(3) as pool:
        for arguments, done in zip(expected, pool.map(lambda words: run(*words), expected), strict=True):
            assert done.returncode == expected[arguments], (arguments, done.stderr)
            assert "Traceback" not in done.stderr, arguments
    assert os.listdir(tmp_path) == []


def test_check_config_says_every_mistake(capture: Capture, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    text = capture.agent.config.read_text()
    wrong.write_text(text.replace("retention", "retentoin").replace('"1s"', '"1 parsec"', 1))

    done = run("check-config", str(wrong))

    assert done.returncode == 2
    assert "did you mean 'retention'?" in done.stderr
    assert "not a duration" in done.stderr


def test_list_finds_by_instance(capture: Capture) -> None:
    config = ["--config", str(capture.agent.config), "-f", "json"]

    [row] = json.loads(run("list", "--instance", capture.instance, *config).stdout)
    none = json.loads(run("list", "--instance", "another", *config).stdout)

    assert (row["backup"], row["name"], row["destination"]) == (capture.attempt, "db-1", "vault")
    assert none == []


def test_a_bundle_without_its_sidecar_is_listed_by_its_own_header(copy: Copy) -> None:
    """What an analyst is sent is often the sealed file alone."""
    for sidecar in copy.store.glob("*.json"):
        sidecar.unlink()

    [row] = json.loads(run("list", "--from", str(copy.store), "-f", "json").stdout)

    assert (row["backup"], row["instance"]) == (copy.attempt, decode(copy.bundle.read_bytes()[:HEADER_BYTES]).instance)
    assert row["created"].startswith("20")
    assert row["expires"] not in ("never", "unknown")


def test_no_key_is_shown_while_a_restore_runs(capture: Capture, copy: Copy) -> None:
    """Neither the key-encryption key nor the data key is in argv, on the terminal, or beside the restored disks."""
    kek = copy.keyfile.read_text().strip()
    words = decode(copy.bundle.read_bytes()[:HEADER_BYTES]).key
    data_key = asyncio.run(KeyFile(str(copy.keyfile)).fetch(words))
    needles = [form for key in (bytes.fromhex(kek), data_key) for form in (key, key.hex().encode(), b64encode(key))]
    command = [sys.executable, "-m", "autobackup.service.cli", "restore", copy.attempt, "--from", str(copy.store),
               "--keyfile", str(copy.keyfile), "--to", str(copy.target), "-f", "json"]  # fmt: skip
    seen = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            for line in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen += line.read_bytes()
                except OSError:
                    continue
            time.sleep(0.05)
        out, err = process.communicate()
    assert process.returncode == 0, err

    texts = [seen, out, err, capture.agent.log_path.read_bytes()]
    texts += [path.read_bytes() for path in (capture.agent.spool / "receipts").iterdir()]
    texts += [path.read_bytes() for path in copy.target.rglob("*") if path.is_file() and path.stat().st_size < MiB]
    assert not [needle for needle in needles for text in texts if needle in text]


# ---- helpers ----------------------------------------------------------------------------------------------------


def failure(copy: Copy) -> AutobackupError | None:
    """What a restore in this process raises; None if it succeeds, and then its target is removed."""

    async def go() -> None:
        workers = Workers()
        try:
            place = opened_folder(copy.store, copy.keyfile)
            sealed = await open_sealed(place.store, place.keys, AttemptId(copy.attempt))
            origins = Origins(places=[place])
            await restore(
                sealed, target=str(copy.target), wanted=Wanted(), origins=origins, workers=workers, show=unseen
            )
        finally:
            workers.close()

    try:
        asyncio.run(go())
    except AutobackupError as exc:
        return exc
    shutil.rmtree(copy.target)
    return None


def flip(path: Path, at_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(at_bytes)
        byte = file.read(1)[0]
        file.seek(at_bytes)
        file.write(bytes([byte ^ 1]))


def edit(path: Path, head: bytes) -> None:
    assert len(head) == HEADER_BYTES
    with path.open("r+b") as file:
        assert file.read(HEADER_BYTES) != head
        file.seek(0)
        file.write(head)
