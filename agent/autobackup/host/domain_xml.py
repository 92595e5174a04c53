"""
A domain's XML, read for what must be known after the domain is gone: disks, formats, chain, firmware, names.

Only the live XML has `<backingStore>`; after a stop, and in the inactive XML, it is gone. So every reading is
merged into what is known: a later one that says less takes nothing away.

The text comes from libvirt, which escapes what users chose; it is parsed, never searched by pattern.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Final
from xml.etree import ElementTree

from autobackup.errors import Damaged
from autobackup.model import ChainLink, DiskSource, InstanceId, InstanceRecord, ServerRecord

_NOVA: Final = (
    "{http://openstack.org/xmlns/libvirt/nova/1.1}",
    "{http://openstack.org/xmlns/libvirt/nova/1.0}",
)
_NOT_NOVAS: Final = ServerRecord(domain="", extra_specs={}, image_properties={}, image_heard=True, properties={})


def read_domain(xml: str) -> InstanceRecord:
    """The facts in one XML document. Raises `Damaged` if it is not a domain."""
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - libvirtd's own output; expat expands no external entity
    except ElementTree.ParseError as exc:
        raise Damaged(f"domain XML: {exc}") from exc
    uuid = root.findtext("uuid")
    if root.tag != "domain" or not uuid:
        raise Damaged("domain XML: no <domain> with a <uuid>")
    display_name, owner_project, server = _nova_words(root)
    nvram = root.find("os/nvram")
    return InstanceRecord(
        instance=InstanceId(uuid),
        libvirt_name=root.findtext("name") or "",
        display_name=display_name,
        owner_project=owner_project,
        server=server,
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
    tells_of_server = new.server != _NOT_NOVAS or known.server == ServerRecord()
    return replace(
        new,
        display_name=new.display_name or known.display_name,
        owner_project=new.owner_project or known.owner_project,
        server=_with_domain(known.server, new.server) if tells_of_server else known.server,
        disks=disks,
        domain_xml=new.domain_xml if has_chain or not known.domain_xml else known.domain_xml,
        root_inode=known.root_inode,
        resized_inodes=known.resized_inodes,
        reverted_inodes=known.reverted_inodes,
        companion_inodes=known.companion_inodes,
        outlived_inodes=known.outlived_inodes,
        migrated_away=known.migrated_away,
        request=known.request,
    )


def merge_server(known: ServerRecord, new: ServerRecord) -> ServerRecord:
    """*new* over *known*; what *new* does not tell is not forgotten."""
    told = {field.name: getattr(new, field.name) for field in fields(ServerRecord)}
    return replace(known, **{name: value for name, value in told.items() if _tells(name, value)})


def _tells(name: str, value: object) -> bool:
    """Whether a field says something; that a server is in no domain of Keystone's is a word, too."""
    return value is not None if name == "domain" else value not in ("", None, False)


def _with_domain(known: ServerRecord, domain: ServerRecord) -> ServerRecord:
    """Of an image's properties a domain has only those that Nova knows: Glance's are not forgotten for them."""
    if known.image and domain.image and known.image != domain.image:
        merged = merge_server(known, domain)
        return replace(merged, image_properties=domain.image_properties, image_heard=False)
    properties = {**(domain.image_properties or {}), **(known.image_properties or {})}
    is_told = domain.image_properties is not None or known.image_properties is not None
    return replace(merge_server(known, domain), image_properties=properties if is_told else None)


def _nova_words(root: ElementTree.Element) -> tuple[str, str, ServerRecord]:
    """Nova's name of the server, its project's id, and the rest. Without Nova's metadata there is no more to know."""
    for ns in _NOVA:
        instance = root.find(f"metadata/{ns}instance")
        if instance is not None:
            return (
                instance.findtext(f"{ns}name") or "",
                _of(instance, ns, "owner/project", "uuid"),
                _server(instance, ns),
            )
    return "", "", _NOT_NOVAS


def _server(instance: ElementTree.Element, ns: str) -> ServerRecord:
    """Extra specs and the image are there since Nova 2025.2 alone; a server's properties never are."""
    return ServerRecord(
        project_name=(instance.findtext(f"{ns}owner/{ns}project") or "").strip(),
        user=_of(instance, ns, "owner/user", "uuid"),
        user_name=(instance.findtext(f"{ns}owner/{ns}user") or "").strip(),
        flavor=_of(instance, ns, "flavor", "name"),
        extra_specs=_named_texts(instance.find(f"{ns}flavor/{ns}extraSpecs"), f"{ns}extraSpec"),
        image=_of(instance, ns, "image", "uuid") or _root_image(instance, ns),
        image_properties=_named_texts(instance.find(f"{ns}image/{ns}properties"), f"{ns}property"),
    )


def _root_image(instance: ElementTree.Element, ns: str) -> str:
    return _of(instance, ns, "root", "uuid") if _of(instance, ns, "root", "type") == "image" else ""


def _of(instance: ElementTree.Element, ns: str, path: str, attribute: str) -> str:
    found = instance.find("/".join(f"{ns}{part}" for part in path.split("/")))
    return "" if found is None else found.get(attribute, "")


def _named_texts(table: ElementTree.Element | None, tag: str) -> Mapping[str, str] | None:
    return None if table is None else {one.get("name", ""): (one.text or "").strip() for one in table.findall(tag)}


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
