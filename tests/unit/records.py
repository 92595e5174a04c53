"""A job, an instance and a request with every field set, for whoever journals them."""

import dataclasses

from autobackup.model import (
    Anchor,
    AttemptId,
    AttemptRecord,
    BaseRecord,
    ChainLink,
    CopyRecord,
    CopyState,
    DestinationName,
    DiskIdentity,
    DiskSource,
    HeldFile,
    InstanceId,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    Occasion,
    Protection,
    Request,
    RequestSource,
    ServerRecord,
    VerdictKind,
)

UUID = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
BASE = ChainLink(path="/var/lib/nova/instances/_base/da39a3ee5e6b4b0d3255bfef95601890afd80709", format="raw")
BELOW = ChainLink(path="/srv/golden.qcow2", format="qcow2")
IDENTITY = DiskIdentity(device=2049, inode=2**63, generation=2**32 - 1, size_bytes=10 << 30, mtime_ns=-1)
BASE_RECORD = BaseRecord(
    identity=IDENTITY,
    sha256="3" * 64,
    sha512="5" * 128,
    is_damaged=True,
    same_as=("155d900f:10737418240:00ff",),
    copies=("b1:99:aa", "b2:98:"),
)

REQUEST = Request(
    project="5f705771f3824b2ab3bd4ad10e3ee0a2",
    reader="0" * 31 + "1",
    retention_s=604800.5,
    enabled=False,
    source=RequestSource.FLAVOR,
    refused="project 5f has not consented",
    asked=False,
)
SERVER = ServerRecord(
    name="Überwachung 2",
    project_name="Finanzen",
    user="0" * 31 + "1",
    user_name="alice",
    domain="default",
    flavor="m1.small",
    extra_specs={"hw:mem_page_size": "large", "autobackup:enabled": "true"},
    image="155d900f-4e14-4e4c-a73d-069cbf4541e6",
    image_properties={"os_distro": "debian"},
    image_heard=True,
    properties={"autobackup": "true", "": ""},
)
INSTANCE = InstanceRecord(
    instance=UUID,
    libvirt_name="instance-0000002a",
    display_name="Überwachung \u2028 \U0001f4be",
    owner_project="5f705771f3824b2ab3bd4ad10e3ee0a2",
    server=SERVER,
    disks=(
        DiskSource(path="/i/disk", format="qcow2", chain=(BASE, BELOW), chain_source="libvirt"),
        DiskSource(path="/i/disk.config", format="raw"),
    ),
    nvram_path="/var/lib/libvirt/qemu/nvram/instance-0000002a_VARS.fd",
    tpm=True,
    domain_xml="<domain>\n  <name>\"quoted\" \\ 'twice'</name>\x00\n</domain>",
    root_inode=2**63,
    resized_inodes=(1, 2**63),
    reverted_inodes=(3,),
    companion_inodes=(4, 5),
    outlived_inodes=(6,),
    migrated_away=True,
    request=REQUEST,
    updated_at_s=1_700_000_000.123456,
)
JOB = JobRecord(
    job=JobId("8d3c"),
    instance=UUID,
    state=JobState.PARKED,
    verdict=VerdictKind.TERMINATED,
    verdict_reason="the domain is gone",
    occasion=Occasion.SHELVE_OFFLOAD,
    rule="everything",
    scrub_method="zero",
    created_at_s=1_700_000_000.5,
    updated_at_s=1_700_000_001.0,
    source=INSTANCE,
    files=(
        HeldFile(
            link=f"{UUID}.disk.12",
            disk="disk",
            source_path="/i/disk",
            format="qcow2",
            chain=(BASE,),
            chain_source="header",
            identity=IDENTITY,
        ),
        HeldFile(
            link=f"{UUID}.console.log.13",
            disk="console.log",
            source_path="/i/console.log",
            format="raw",
            identity=dataclasses.replace(IDENTITY, generation=None),
        ),
    ),
    copies=tuple(
        CopyRecord(
            destination=DestinationName(f"vault-{state}"),
            state=state,
            attempt=AttemptRecord(
                attempt=AttemptId("a1"),
                started_at_s=1.5,
                size_bytes=2**40,
                digest="00ff",
                digest_algorithm="sha512",
            ),
            obsolete=(AttemptId("a0"), AttemptId("a-1")),
            failure_count=3,
            not_before_s=1_700_000_900.0,
            last_error="No space left on device",
            verified_at_s=1_700_000_001.25,
            request=REQUEST,
            retention_s=86400.25,
            anchors=(
                Anchor(path=BASE.path, parent="155d900f-4e14-4e4c-a73d-069cbf4541e6", protection=Protection.POLICY),
                Anchor(path=BELOW.path, parent="b1", protection=Protection.COPY),
            ),
            base_attempt=AttemptId("b2"),
        )
        for state in CopyState
    ),
    not_captured={"swtpm": "it was not there"},
    first_read={f"{UUID}.disk.12": IDENTITY},
    member_digests={"disks/disk": "ab" * 64},
    unreadable=True,
    failure_count=7,
    not_before_s=1_700_000_000.75,
    last_error="line one\nline two",
    still_named=("/i/6a_del/disk",),
)
