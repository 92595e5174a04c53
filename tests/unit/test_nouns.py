"""Small promises of the nouns: nothing changes in place, what a disk is, what an instance is called."""

import dataclasses
from typing import Any

import pytest
from tests.unit.records import BASE, BELOW, IDENTITY, JOB, UUID

from autobackup.model import (
    ChainLink,
    CopyRecord,
    DiskIdentity,
    DiskSource,
    HeldFile,
    InstanceRecord,
    JobRecord,
    Request,
    ServerRecord,
)


@pytest.mark.parametrize(
    "kind",
    [DiskIdentity, ChainLink, DiskSource, InstanceRecord, HeldFile, CopyRecord, JobRecord, Request, ServerRecord],
)
def test_nothing_of_it_can_be_changed_in_place(kind: type[Any]) -> None:
    assert kind.__dataclass_params__.frozen
    assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind)


@pytest.mark.parametrize(
    ("changed", "same_inode", "same_content"),
    [
        ({}, True, True),
        ({"size_bytes": 1}, True, False),
        ({"mtime_ns": 1}, True, False),
        ({"inode": 1}, False, False),
        ({"generation": 1}, False, False),
        ({"generation": None}, False, False),
        ({"device": 1}, True, True),
    ],
    ids=str,
)
def test_a_disk_is_its_inode_and_generation_and_unwritten_while_size_and_mtime_stay(
    changed: dict[str, Any], same_inode: bool, same_content: bool
) -> None:
    """The number of a device can differ after a reboot: it is not part of what a journal can compare."""
    other = dataclasses.replace(IDENTITY, **changed)
    for one, two in ((IDENTITY, other), (other, IDENTITY)):
        assert one.same_inode(two) is same_inode
        assert one.same_content(two) is same_content


def test_an_instance_is_called_what_its_owner_calls_it() -> None:
    """Now: the name in its domain is that of its last start."""
    renamed = InstanceRecord(
        instance=UUID, libvirt_name="instance-1", display_name="web", server=ServerRecord(name="db")
    )
    assert renamed.name == "db"
    assert InstanceRecord(instance=UUID, libvirt_name="instance-1", display_name="web").name == "web"
    assert InstanceRecord(instance=UUID, libvirt_name="instance-1").name == "instance-1"
    assert InstanceRecord(instance=UUID).name == ""


def test_the_bases_of_a_job_are_named_once_in_the_order_of_its_files() -> None:
    chains = [(BASE, BELOW), (), (BELOW,), (BASE,)]
    files = tuple(dataclasses.replace(JOB.files[0], chain=chain) for chain in chains)
    assert dataclasses.replace(JOB, files=files).bases == (BASE, BELOW)
