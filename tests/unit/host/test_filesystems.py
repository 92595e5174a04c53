"""What the spool asks of the filesystem below it, asked of real ones."""

import os
from pathlib import Path

import pytest
from tests.lab.filesystem import bind_mount, loop_filesystem, tmpfs

from autobackup.errors import ConfigError
from autobackup.host.filesystems import check_spool, kind_of, sync_folder


def make(root: Path) -> tuple[Path, Path]:
    instances, spool = root / "instances", root / "instances" / ".autobackup"
    spool.mkdir(parents=True)
    return instances, spool


def check(instances: Path, spool: Path, *allowed: str) -> None:
    check_spool(instances_path=str(instances), spool_path=str(spool), allowed=allowed)


def test_ext4_passes_and_leaves_nothing() -> None:
    with loop_filesystem("ext4", 32 << 20) as filesystem:
        instances, spool = make(filesystem.mount_point)
        assert kind_of(str(spool)) == "ext4"
        check(instances, spool, "ext4", "xfs")
        assert os.listdir(instances) == [".autobackup"]
        assert os.listdir(spool) == []


def test_a_kind_that_was_not_measured_is_refused_until_the_configuration_names_it() -> None:
    with tmpfs(8 << 20) as root:
        instances, spool = make(root)
        assert kind_of(str(spool)) == "tmpfs"
        with pytest.raises(ConfigError, match=r"tmpfs.*ext4 or xfs.*capture\.filesystems"):
            check(instances, spool, "ext4", "xfs")
        check(instances, spool, "ext4", "tmpfs")


def test_two_mounts_of_one_filesystem_are_two() -> None:
    """Neither st_dev nor the path shows it; only a real link does."""
    with loop_filesystem("ext4", 32 << 20) as filesystem:
        instances, spool = make(filesystem.mount_point)
        with bind_mount(spool, spool):
            assert os.stat(spool).st_dev == os.stat(instances).st_dev
            with pytest.raises(ConfigError, match=r"another mount.*ReadWritePaths"):
                check(instances, spool, "ext4")
        assert os.listdir(instances) == [".autobackup"]
        check(instances, spool, "ext4")


def test_a_probe_that_a_killed_agent_left_is_no_obstacle(tmp_path: Path) -> None:
    instances, spool = make(tmp_path)
    (instances / f".autobackup-probe-{os.getpid()}").touch()
    (spool / f"probe-{os.getpid()}").touch()
    check(instances, spool, kind_of(str(spool)))
    assert os.listdir(instances) == [".autobackup"]
    assert os.listdir(spool) == []


def test_a_folder_can_be_synced_and_a_file_is_none(tmp_path: Path) -> None:
    sync_folder(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        sync_folder(str(tmp_path / "file"))
