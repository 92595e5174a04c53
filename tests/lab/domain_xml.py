"""
Domain XML as Nova's libvirt driver writes it, for QEMU under TCG and for the test driver.

`Facts` is what Nova knows of a server and puts into the <metadata> element. Server
properties, tags and description are not in there: Nova does not put them there either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from xml.etree import ElementTree as ET

NOVA_NAMESPACE: Final = "http://openstack.org/xmlns/libvirt/nova/1.1"

Driver = Literal["qemu", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The <nova:instance> element. `extra_specs` and `image` are there since Nova 32 (2025.2)."""

    name: str = "vm"
    project_id: str = "5c1d7e3a0a8f4f0e9b6e2d4c8a7b9f10"
    project_name: str = "demo"
    user_id: str = "9e8d7c6b5a49483726150f1e2d3c4b5a"
    user_name: str = "alice"
    flavor: str = "m1.nano"
    extra_specs: Mapping[str, str] = field(default_factory=dict)
    image_properties: Mapping[str, str] = field(default_factory=dict)
    creation_time: str = "2026-01-02 03:04:05"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDevice:
    path: Path
    format: Literal["qcow2", "raw"]
    device: Literal["disk", "cdrom"] = "disk"


def domain_xml(
    *,
    driver: Driver,
    name: str,
    uuid: str,
    memory_mib: int,
    devices: Sequence[DiskDevice],
    cache: str,
    console: Path,
    metadata: ET.Element | None,
) -> str:
    domain = ET.Element("domain", type=driver)
    _add(domain, "name", name)
    _add(domain, "uuid", uuid)
    if metadata is not None:
        ET.SubElement(domain, "metadata").append(metadata)
    _add(domain, "memory", str(memory_mib * 1024), unit="KiB")
    _add(domain, "vcpu", "1", placement="static")
    system = ET.SubElement(domain, "os")
    if driver == "test":
        _add(system, "type", "hvm")
    else:
        _add_qemu_platform(domain, system, uuid)
    parts = ET.SubElement(domain, "devices")
    for index, disk in enumerate(devices):
        _add_disk(parts, disk, letter="abcdefgh"[index], cache=cache)
    if driver == "qemu":
        _add_console(parts, console)
    return ET.tostring(domain, encoding="unicode")


def nova_metadata(facts: Facts, *, memory_mib: int, root_id: str) -> ET.Element:
    """`root_id` is the image a server was made from, or the snapshot it was unshelved from."""
    ET.register_namespace("nova", NOVA_NAMESPACE)
    instance = ET.Element(_nova("instance"))
    ET.SubElement(instance, _nova("package"), version="26.2.2")
    _add(instance, _nova("name"), facts.name)
    _add(instance, _nova("creationTime"), facts.creation_time)
    flavor = ET.SubElement(instance, _nova("flavor"), name=facts.flavor)
    for tag, amount in (("memory", memory_mib), ("disk", 1), ("swap", 0), ("ephemeral", 0), ("vcpus", 1)):
        _add(flavor, _nova(tag), str(amount))
    if facts.extra_specs:
        specs = ET.SubElement(flavor, _nova("extraSpecs"))
        for key, value in facts.extra_specs.items():
            _add(specs, _nova("extraSpec"), value, name=key)
    if facts.image_properties:
        image = ET.SubElement(instance, _nova("image"), uuid=root_id)
        properties = ET.SubElement(image, _nova("properties"))
        for key, value in facts.image_properties.items():
            _add(properties, _nova("property"), value, name=key)
    owner = ET.SubElement(instance, _nova("owner"))
    _add(owner, _nova("user"), facts.user_name, uuid=facts.user_id)
    _add(owner, _nova("project"), facts.project_name, uuid=facts.project_id)
    ET.SubElement(instance, _nova("root"), type="image", uuid=root_id)
    ET.SubElement(instance, _nova("ports"))
    return instance


def _add_qemu_platform(domain: ET.Element, system: ET.Element, uuid: str) -> None:
    information = ET.Element("sysinfo", type="smbios")
    group = ET.SubElement(information, "system")
    _add(group, "entry", "OpenStack Foundation", name="manufacturer")
    _add(group, "entry", "OpenStack Nova", name="product")
    _add(group, "entry", uuid, name="serial")
    _add(group, "entry", uuid, name="uuid")
    domain.insert(list(domain).index(system), information)
    _add(system, "type", "hvm", arch="x86_64", machine="pc")
    ET.SubElement(system, "boot", dev="hd")
    ET.SubElement(system, "smbios", mode="sysinfo")
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    ET.SubElement(domain, "clock", offset="utc")


def _add_disk(parts: ET.Element, disk: DiskDevice, *, letter: str, cache: str) -> None:
    element = ET.SubElement(parts, "disk", type="file", device=disk.device)
    ET.SubElement(element, "driver", name="qemu", type=disk.format, cache=cache)
    ET.SubElement(element, "source", file=str(disk.path))
    if disk.device == "cdrom":
        ET.SubElement(element, "target", dev=f"hd{letter}", bus="ide")
        ET.SubElement(element, "readonly")
    else:
        ET.SubElement(element, "target", dev=f"vd{letter}", bus="virtio")


def _add_console(parts: ET.Element, console: Path) -> None:
    """A pty that virtlogd copies to console.log, which a start empties: as Nova has it."""
    ET.SubElement(parts, "controller", type="usb", model="none")
    serial = ET.SubElement(parts, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(console), append="off")
    ET.SubElement(serial, "target", port="0")
    ET.SubElement(parts, "memballoon", model="none")


def _nova(tag: str) -> str:
    return f"{{{NOVA_NAMESPACE}}}{tag}"


def _add(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
