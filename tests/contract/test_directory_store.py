"""What only the `directory` store promises: names, modes, the order of its syncs, and what it makes of mount points."""

import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.stores import BodyOf, MiB, directory_bench, new_attempt, pattern
from tests.lab.filesystem import loop_filesystem

from autobackup.errors import StoreRefused, StoreUnavailable
from autobackup.stores.directory import DirectoryStore

REPOSITORY = Path(__file__).parents[2]


async def test_what_it_writes_is_for_its_owner_alone_and_for_sha512sum(tmp_path: Path) -> None:
    root = tmp_path / "store"
    bench, attempt, data = directory_bench(root), new_attempt(), pattern(MiB + 1)
    await bench.store.put(attempt, BodyOf(data, "sha512"), properties={"autobackup_job": "j"})

    assert sorted(path.name for path in root.iterdir()) == [f"{attempt}.autobackup", f"{attempt}.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in root.iterdir()} == {0o600}
    words = json.loads((root / f"{attempt}.json").read_text())
    assert words == {
        "attempt": attempt,
        "size_bytes": len(data),
        "digest_algorithm": "sha512",
        "digest": hashlib.sha512(data).hexdigest(),
        "properties": {"autobackup_job": "j"},
    }


async def test_the_folder_is_never_made_by_us(tmp_path: Path) -> None:
    """A mount point that is not mounted looks just the same as one that was forgotten."""
    store = DirectoryStore(str(tmp_path / "absent"))
    with pytest.raises(StoreUnavailable, match="install -d -m 700"):
        await store.put(new_attempt(), BodyOf(b"x", "sha512"), properties={})
    assert not (tmp_path / "absent").exists()


async def test_under_must_be_mount_an_unmounted_folder_holds_nothing_and_denies_nothing() -> None:
    with loop_filesystem("ext4", 32 * MiB) as filesystem:
        filesystem.mount_point.chmod(0o700)
        shutil.rmtree(filesystem.mount_point / "lost+found")
        store = DirectoryStore(str(filesystem.mount_point), must_be_mount=True)
        attempt = new_attempt()
        await store.check()
        await store.put(attempt, BodyOf(b"sealed", "sha512"), properties={})
        filesystem.unmount()
        filesystem.mount_point.chmod(0o700)

        for asked in (
            store.check(),
            store.put(new_attempt(), BodyOf(b"x", "sha512"), properties={}),
            store.stat(attempt),
            store.digest(attempt),
            store.read(attempt, offset=0, length=1),
            store.delete(attempt),
            store.held(),
        ):
            with pytest.raises(StoreUnavailable, match="nothing is mounted there"):
                await asked

        assert list(filesystem.mount_point.iterdir()) == []
        filesystem.mount()
        assert await store.read(attempt, offset=0, length=6) == b"sealed"


async def test_less_room_than_the_reserve_is_full(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    with pytest.raises(StoreUnavailable, match="is full"):
        await DirectoryStore(str(tmp_path / "store"), reserve_bytes=1 << 60).check()


async def test_names_that_are_none_of_ours_are_neither_listed_nor_touched(tmp_path: Path) -> None:
    bench = directory_bench(tmp_path / "store")
    foreign = [tmp_path / "store" / name for name in ("README", "x.autobackup", f"{new_attempt()}.json", "lost+found")]
    for path in foreign:
        path.write_bytes(b"theirs")
    attempt = new_attempt()
    await bench.store.put(attempt, BodyOf(b"x", "sha512"), properties={})

    assert [one.attempt for one in await bench.store.held()] == [attempt]
    await bench.store.delete(attempt)
    assert [path.read_bytes() for path in foreign] == [b"theirs"] * len(foreign)


async def test_a_link_in_the_store_is_not_followed(tmp_path: Path) -> None:
    bench, attempt = directory_bench(tmp_path / "store"), new_attempt()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store" / f"{attempt}.autobackup").symlink_to(tmp_path / "secret")

    for asked in (bench.store.read(attempt, offset=0, length=6), bench.store.digest(attempt)):
        with pytest.raises((StoreUnavailable, StoreRefused)):
            await asked


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_what_has_a_name_was_synced_before(tmp_path: Path) -> None:
    """Bundle, then metadata, then their names, then the folder: seen from outside, in system calls."""
    root, log, attempt = tmp_path / "store", tmp_path / "strace.log", new_attempt()
    root.mkdir(mode=0o700)
    # fmt: off
    subprocess.run(
        ["strace", "-f", "-y", "-o", str(log), "-e", "trace=openat,write,fsync,fdatasync,rename,renameat,renameat2",
         sys.executable, "-m", "tests.contract.stores", json.dumps({"directory": str(root)}), attempt,
         str(2 * MiB), "-2"],
        cwd=REPOSITORY, check=True,
    )
    # fmt: on

    partial = f"{root}/.partial-{attempt}"
    order = [
        step
        for line in log.read_text(errors="replace").splitlines()
        for step, seen in (
            ("write bundle", rf" write\(\d+<{re.escape(partial)}>"),
            ("sync bundle", rf" f(data)?sync\(\d+<{re.escape(partial)}>"),
            ("write metadata", rf" write\(\d+<{re.escape(partial)}\.json>"),
            ("sync metadata", rf" f(data)?sync\(\d+<{re.escape(partial)}\.json>"),
            ("name metadata", rf' rename(at2?)?\(.*\.partial-{attempt}\.json"'),
            ("name bundle", rf' rename(at2?)?\(.*\.partial-{attempt}".*{attempt}\.autobackup"'),
            ("sync folder", rf" fsync\(\d+<{re.escape(str(root))}>"),
        )
        if re.search(seen, line)
    ]
    assert list(dict.fromkeys(order)) == [
        "write bundle", "sync bundle", "write metadata", "sync metadata", "name metadata", "name bundle", "sync folder",
    ]  # fmt: skip
    assert order[-1] == "sync folder"
    assert order.index("sync bundle") > max(at for at, step in enumerate(order) if step == "write bundle")
