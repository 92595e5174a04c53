"""What is read of a domain, live and inactive, and what a later reading may take away: nothing."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobackup.errors import Damaged
from autobackup.host.domain_xml import is_novas, merge, read_domain
from autobackup.model import ChainLink, InstanceRecord, Request

INSTANCE = "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"
FOLDER = f"/var/lib/nova/instances/{INSTANCE}"
BASE = "/var/lib/nova/instances/_base/0123456789abcdef0123456789abcdef01234567"

CHAIN = f"""
      <backingStore type='file' index='3'>
        <format type='qcow2'/>
        <source file='{BASE}_top'/>
        <backingStore type='file' index='4'>
          <format type='raw'/>
          <source file='{BASE}'/>
          <backingStore/>
        </backingStore>
      </backingStore>"""


def domain(*, chain: str = "", name: str = "web &lt;1&gt;", extra: str = "") -> str:
    return f"""<domain type='kvm' id='7'>
  <name>instance-00000007</name>
  <uuid>{INSTANCE}</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:name>{name}</nova:name>
      <nova:owner>
        <nova:user uuid="0a">admin</nova:user>
        <nova:project uuid="5e3c">demo</nova:project>
      </nova:owner>
    </nova:instance>
  </metadata>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/instance-00000007_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='{FOLDER}/disk' index='1'/>{chain}
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='{FOLDER}/disk.config'/>
      <backingStore/>
      <target dev='hda' bus='ide'/>
      <readonly/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/sdx'/><target dev='vdb'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='v/x'/><target dev='vdc'/></disk>
    <disk type='file' device='cdrom'><target dev='hdb'/></disk>
    <disk type='file' device='disk'><source file='/plain'/><target dev='vdd'/></disk>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>{extra}
  </devices>
</domain>"""


LIVE, INACTIVE = domain(chain=CHAIN), domain()


def test_the_live_text_says_all() -> None:
    record = read_domain(LIVE)
    assert (record.instance, record.libvirt_name) == (INSTANCE, "instance-00000007")
    assert (record.display_name, record.owner_project) == ("web <1>", "5e3c")
    assert record.nvram_path == "/var/lib/libvirt/qemu/nvram/instance-00000007_VARS.fd"
    assert record.tpm
    root, config, plain = record.disks
    assert (root.path, root.format, root.chain_source) == (f"{FOLDER}/disk", "qcow2", "libvirt")
    assert root.chain == (ChainLink(path=f"{BASE}_top", format="qcow2"), ChainLink(path=BASE, format="raw"))
    assert (config.format, config.chain, config.chain_source) == ("raw", (), "libvirt")
    assert (plain.format, plain.chain_source) == ("raw", "none")
    assert is_novas(LIVE)


def test_what_lies_on_no_file_of_this_host_is_not_a_disk() -> None:
    assert [disk.path for disk in read_domain(LIVE).disks] == [f"{FOLDER}/disk", f"{FOLDER}/disk.config", "/plain"]


def test_a_reading_that_says_less_takes_no_chain_away() -> None:
    live, inactive = read_domain(LIVE), read_domain(INACTIVE)
    assert inactive.disks[0].chain == ()
    merged = merge(live, inactive)
    assert merged.disks == live.disks
    assert merge(merged, inactive).disks == live.disks
    assert merge(None, inactive) == inactive


def test_a_disk_whose_format_changed_has_no_chain_of_the_old_one() -> None:
    flat = domain().replace("type='qcow2' cache", "type='raw' cache")
    assert merge(read_domain(LIVE), read_domain(flat)).disks[0].chain == ()


def test_a_live_reading_replaces_the_chain() -> None:
    rebased = domain(chain=CHAIN.replace("_top", "_new"))
    assert merge(read_domain(LIVE), read_domain(rebased)).disks[0].chain[0].path == f"{BASE}_new"


def test_what_others_learnt_is_kept() -> None:
    others: dict[str, Any] = {
        "root_inode": 7, "resized_inodes": (1, 2), "reverted_inodes": (3,), "companion_inodes": (4,),
        "outlived_inodes": (5,), "migrated_away": True, "request": Request(project="5e3c"),
    }  # fmt: skip
    merged = merge(replace(read_domain(LIVE), **others), read_domain(INACTIVE))
    assert {name: getattr(merged, name) for name in others} == others


def test_a_field_is_read_of_the_domain_or_learnt_elsewhere_and_merged_or_kept() -> None:
    """A new one of either kind must be merged, too."""
    read = {"instance", "libvirt_name", "display_name", "owner_project", "server", "disks", "nvram_path", "tpm",
            "domain_xml"}  # fmt: skip
    learnt = {"root_inode", "resized_inodes", "reverted_inodes", "companion_inodes", "outlived_inodes",
              "migrated_away", "request", "updated_at_s"}  # fmt: skip
    assert {field.name for field in fields(InstanceRecord)} == read | learnt


@pytest.mark.parametrize(
    "text",
    ["", "x", "<domain>", "<domain/>", "<domain><uuid/></domain>", "<network><uuid>x</uuid></network>", LIVE[:-3],
     "<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/shadow'>]><domain><uuid>&e;</uuid></domain>"],
)  # fmt: skip
def test_what_is_no_domain_is_damaged(text: str) -> None:
    with pytest.raises(Damaged):
        read_domain(text)


@given(st.integers(0, len(LIVE) - 1), st.characters(codec="ascii"))
def test_one_wrong_character_is_another_domain_or_damaged(at: int, character: str) -> None:
    try:
        read_domain(LIVE[:at] + character + LIVE[at + 1 :])
    except Damaged:
        return


def test_a_domain_of_somebody_else_is_not_novas() -> None:
    assert not is_novas("<domain><uuid>x</uuid><name>nova</name></domain>")
