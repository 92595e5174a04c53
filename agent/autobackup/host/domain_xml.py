"""
A domain's XML, read for what must be known after the domain is gone: disks, formats, chain, firmware, names.

Only the live XML has `<backingStore>`; after a stop, and in the inactive XML, it is gone. So every reading is
merged into what is known: a later one that says less takes nothing away.

The text comes from libvirt, which escapes what users chose; it is parsed, never searched by pattern.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from xml.etree import ElementTree

from autobackup.errors import Damaged
from autobackup.model import ChainLink, DiskSource, InstanceId, InstanceRecord

_NOVA: Final = (
    "{http://openstack.org/xmlns/libvirt/nova/1.1}",
    "{http://openstack.org/xmlns/libvirt/nova/1.0}",
)


def read_domain(xml: str) -> InstanceRecord:
    """The facts in one XML document. Raises `Damaged` if it is not a domain."""
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - libvirtd's own output; expat expands no external entity
    except ElementTree.ParseError as exc:
        raise Damaged(f"domain XML: {exc}") from exc
    uuid = root.findtext("uuid")
    if root.tag != "domain" or not uuid:
        raise Damaged("domain XML: no <domain> with a <uuid>")
    display_name, owner_project = _nova_words(root)
    nvram = root.find("os/nvram")
    return InstanceRecord(
        instance=InstanceId(uuid),
        libvirt_name=root.findtext("name") or "",
        display_name=display_name,
        owner_project=owner_project,
        disks=tuple(_disks(root)),
        nvram_path=(nvram.text or "").strip() or None if nvram is not None else None,
        tpm=root.find("devices/tpm/backend[@type='emulator']") is not None,
        domain_xml=xml,
    )


def is_novas(xml: str) -> bool:
    """True when Nova wrote its metadata into the domain: then libvirt's word is not enough for a verdict."""
    return any(ns.strip("{}") in xml for ns in _NOVA)


def merge(known: InstanceRecord | None, new: InstanceRecord) -> InstanceRecord:
    """*new* over *known*; a chain that is known is not forgotten because an inactive XML lacks it."""
    if known is None:
        return new
    old: Mapping[str, DiskSource] = {disk.path: disk for disk in known.disks}
    disks = tuple(
        replace(disk, chain=old[disk.path].chain, chain_source=old[disk.path].chain_source)
        if disk.chain_source == "none" and disk.path in old and old[disk.path].format == disk.format
        else disk
        for disk in new.disks
    )
    has_chain = any(disk.chain_source != "none" for disk in new.disks)
    return replace(
        new,
        disks=disks,
        domain_xml=new.domain_xml if has_chain or not known.domain_xml else known.domain_xml,
        resized_inodes=known.resized_inodes,
        migrated_away=known.migrated_away,
        request=known.request,
    )


def _nova_words(root: ElementTree.Element) -> tuple[str, str]:
    for ns in _NOVA:
        instance = root.find(f"metadata/{ns}instance")
        if instance is not None:
            project = instance.find(f"{ns}owner/{ns}project")
            return (instance.findtext(f"{ns}name") or "", project.get("uuid", "") if project is not None else "")
    return "", ""


def _disks(root: ElementTree.Element) -> list[DiskSource]:
    disks = []
    for disk in root.findall("devices/disk"):
        source = disk.find("source")
        path = source.get("file") if source is not None else None
        if path is None:
            continue  # a volume or an empty drive: nothing of it lies on this host
        driver = disk.find("driver")
        chain = list(_chain(disk.find("backingStore")))
        disks.append(
            DiskSource(
                path=path,
                format=(driver.get("type") if driver is not None else None) or "raw",  # libvirt's own default
                chain=tuple(chain),
                chain_source="libvirt" if disk.find("backingStore") is not None else "none",
            )
        )
    return disks


def _chain(store: ElementTree.Element | None) -> list[ChainLink]:
    links = []
    while store is not None:
        source, kind = store.find("source"), store.find("format")
        path = source.get("file") if source is not None else None
        if path is None:
            break
        links.append(ChainLink(path=path, format=(kind.get("type") if kind is not None else None) or "raw"))
        store = store.find("backingStore")
    return links
