"""
What Nova writes into a domain: the words of 2025.2, the fewer of older ones, none; and what a reading may take away.

The first text is what LibvirtConfigGuestMetaNovaInstance of nova 34.0.0 writes, facts/nova.md section 5. Of an image's
properties it has only those that Nova knows; a server's own are in no version.
"""

from dataclasses import replace
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobackup.host.domain_xml import is_novas, merge, merge_server, read_domain
from autobackup.model import InstanceRecord, ServerRecord

UUID = "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"
USER, PROJECT, IMAGE = "4d" * 16, "5e" * 16, "155d900f-4e14-4e4c-a73d-069cbf4541e6"
OWNER = f"""
      <nova:owner>
        <nova:user uuid="{USER}">alice</nova:user>
        <nova:project uuid="{PROJECT}">Finance &amp; Co</nova:project>
      </nova:owner>"""
FLAVOR_2025_2 = """
      <nova:flavor name="m1.small" id="42">
        <nova:memory>2048</nova:memory><nova:disk>20</nova:disk><nova:swap>0</nova:swap>
        <nova:ephemeral>0</nova:ephemeral><nova:vcpus>1</nova:vcpus>
        <nova:extraSpecs>
          <nova:extraSpec name="hw:mem_page_size">large</nova:extraSpec>
          <nova:extraSpec name="autobackup:enabled">true</nova:extraSpec>
        </nova:extraSpecs>
      </nova:flavor>"""
FLAVOR_BEFORE = '<nova:flavor name="m1.small"><nova:memory>2048</nova:memory><nova:vcpus>1</nova:vcpus></nova:flavor>'
IMAGE_2025_2 = f"""
      <nova:image uuid="{IMAGE}">
        <nova:containerFormat>bare</nova:containerFormat><nova:diskFormat>qcow2</nova:diskFormat>
        <nova:minDisk>1</nova:minDisk><nova:minRam>0</nova:minRam>
        <nova:properties>
          <nova:property name="hw_disk_bus">virtio</nova:property>
          <nova:property name="os_distro">debian</nova:property>
        </nova:properties>
      </nova:image>"""
ROOT = f'<nova:root type="image" uuid="{IMAGE}"/>'
PORTS = (
    '<nova:ports><nova:port uuid="9a"><nova:ip type="fixed" address="10.0.0.4" ipVersion="4"/></nova:port></nova:ports>'
)


def domain(*parts: str, namespace: str = "1.1", name: str = "web") -> str:
    instance = f"""
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/{namespace}">
      <nova:package version="34.0.0"/>
      <nova:name>{name}</nova:name>
      <nova:creationTime>2026-11-22 17:00:00</nova:creationTime>{"".join(parts)}
    </nova:instance>"""
    return f"""<domain type='kvm'><name>instance-2a</name><uuid>{UUID}</uuid>
  <metadata>{instance if parts else ""}</metadata></domain>"""


TODAY = domain(FLAVOR_2025_2, IMAGE_2025_2, OWNER, ROOT, PORTS)
BEFORE = domain(FLAVOR_BEFORE, OWNER, ROOT)
PLAIN = domain()


def test_the_words_of_2025_2() -> None:
    record = read_domain(TODAY)
    assert (record.display_name, record.owner_project) == ("web", PROJECT)
    assert record.server == ServerRecord(
        project_name="Finance & Co",
        user=USER,
        user_name="alice",
        domain=None,
        flavor="m1.small",
        extra_specs={"hw:mem_page_size": "large", "autobackup:enabled": "true"},
        image=IMAGE,
        image_properties={"hw_disk_bus": "virtio", "os_distro": "debian"},
        image_heard=False,
        properties=None,
    )
    assert is_novas(TODAY)


@pytest.mark.parametrize("namespace", ["1.0", "1.1"])
def test_the_words_of_an_older_nova(namespace: str) -> None:
    """What it does not write is not known: a flavor without extra specs is another thing."""
    record = read_domain(domain(FLAVOR_BEFORE, OWNER, ROOT, namespace=namespace))
    assert (record.display_name, record.owner_project) == ("web", PROJECT)
    assert record.server == ServerRecord(
        project_name="Finance & Co", user=USER, user_name="alice", flavor="m1.small", image=IMAGE
    )


def test_a_flavor_without_extra_specs_and_an_image_without_properties_are_known_to_have_none() -> None:
    """2025.2 writes both elements always; they are empty."""
    flavor = '<nova:flavor name="m1.small" id="42"><nova:extraSpecs/></nova:flavor>'
    server = read_domain(domain(flavor, f'<nova:image uuid="{IMAGE}"><nova:properties/></nova:image>')).server
    assert (server.extra_specs, server.image_properties) == ({}, {})


def test_a_server_that_was_booted_from_a_volume_has_no_image() -> None:
    volume = f'<nova:root type="volume" uuid="{IMAGE}"/>'
    assert (
        read_domain(domain(FLAVOR_2025_2, '<nova:image uuid=""><nova:properties/></nova:image>', volume)).server.image
        == ""
    )
    assert read_domain(domain(FLAVOR_BEFORE, OWNER, volume)).server.image == ""


def test_a_domain_of_nobodys_cloud_has_no_more_to_tell() -> None:
    record = read_domain(PLAIN)
    assert (record.display_name, record.owner_project, record.libvirt_name) == ("", "", "instance-2a")
    assert record.server == ServerRecord(
        domain="", extra_specs={}, image_properties={}, image_heard=True, properties={}
    )
    assert not is_novas(PLAIN)


def test_metadata_of_somebody_elses_is_none_of_novas() -> None:
    other = TODAY.replace("openstack.org/xmlns/libvirt/nova", "example.org/nova")
    assert read_domain(other).server == read_domain(PLAIN).server


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff")))
def test_what_owners_and_operators_write_comes_whole_and_is_never_markup(text: str) -> None:
    text = text.strip()
    spec = f"<nova:flavor name={quoteattr(text)}><nova:extraSpecs><nova:extraSpec name={quoteattr(text)}>{escape(text)}"
    record = read_domain(domain(f"{spec}</nova:extraSpec></nova:extraSpecs></nova:flavor>", name=escape(text)))
    assert record.server.flavor == text
    assert record.server.extra_specs == {text: text}
    assert record.display_name.strip() == text


# ---- what a reading may take away -----------------------------------------------------------------------------------

API = ServerRecord(
    user=USER,
    domain="default",
    flavor="m1.small",
    extra_specs={"hw:mem_page_size": "large", "autobackup:enabled": "true"},
    image=IMAGE,
    image_properties={"hw_disk_bus": "virtio", "os_distro": "debian", "class": "gold", "autobackup:enabled": "true"},
    image_heard=True,
    properties={"autobackup": "true"},
)


def known() -> InstanceRecord:
    """By the domain, and then by OpenStack."""
    record = read_domain(TODAY)
    return replace(record, server=merge_server(record.server, API))


@pytest.mark.parametrize("xml", [TODAY, BEFORE, PLAIN, domain(FLAVOR_BEFORE), domain(OWNER)])
def test_a_reading_that_says_less_takes_no_word_away(xml: str) -> None:
    """Whichever domain is seen: what OpenStack told, no domain can know better."""
    merged = merge(known(), read_domain(xml))
    assert (merged.display_name, merged.owner_project) == ("web", PROJECT)
    assert merged.server == known().server
    assert merge(merged, read_domain(xml)) == merged


def test_of_an_images_properties_glances_stay() -> None:
    """Nova drops those that it does not know: `class` would be there and not be there by turns."""
    merged = merge(known(), read_domain(TODAY)).server
    assert merged.image_properties == API.image_properties
    assert merged.image_heard


def test_an_older_reading_is_added_to_by_a_newer() -> None:
    merged = merge(read_domain(BEFORE), read_domain(TODAY))
    assert merged.server == read_domain(TODAY).server
    back = merge(merged, read_domain(BEFORE))
    assert back.server == merged.server


def test_a_reading_that_says_otherwise_is_believed() -> None:
    """A resize to another flavor, a rebuild from another image."""
    resized = TODAY.replace("m1.small", "m1.large").replace(">large<", ">small<")
    merged = merge(read_domain(TODAY), read_domain(resized)).server
    assert merged.flavor == "m1.large"
    assert merged.extra_specs == {"hw:mem_page_size": "small", "autobackup:enabled": "true"}


def test_of_another_image_nothing_is_known_of_the_first() -> None:
    """A rebuild: Glance has not been asked of the new one."""
    other = IMAGE.replace("155d", "266e")
    server = merge(known(), read_domain(TODAY.replace(IMAGE, other))).server
    assert (server.image, server.image_heard) == (other, False)
    assert server.image_properties == {"hw_disk_bus": "virtio", "os_distro": "debian"}
    assert server.properties == API.properties


def test_a_record_of_which_nothing_was_known_is_as_the_domain_says() -> None:
    blank = InstanceRecord(instance=read_domain(TODAY).instance)
    for xml in (TODAY, BEFORE, PLAIN):
        assert merge(blank, read_domain(xml)) == read_domain(xml)
        assert merge(None, read_domain(xml)) == read_domain(xml)


def test_owners_may_take_their_words_back() -> None:
    """By the API alone, which tells all of them each time: an empty table is an answer."""
    assert merge_server(known().server, replace(API, properties={})).properties == {}
    assert merge_server(known().server, ServerRecord()) == known().server
