"""
A spool outlives the version that wrote it: what the version before left there is read as it was meant.

The journals are those of commit 16cb98f, which knew neither occasions, nor sources of requests, nor what Nova says of
a server. They are never edited; a new version adds its own.
"""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from tests.unit.records import BASE, BELOW, IDENTITY, REQUEST, UUID

from autobackup.model import (
    CopyState,
    InstanceRecord,
    JobRecord,
    JobState,
    Occasion,
    Request,
    RequestSource,
    ServerRecord,
    VerdictKind,
    decode,
    encode,
)
from autobackup.rules.matching import Surroundings, conditions
from autobackup.terms import Match

JOURNALS = Path(__file__).parent / "journals"
OWNERS = Request(project=REQUEST.project, reader=REQUEST.reader, retention_s=REQUEST.retention_s)


@pytest.fixture
def instance() -> InstanceRecord:
    return decode(InstanceRecord, (JOURNALS / "16cb98f-instance.json").read_bytes(), where="instance")


@pytest.fixture
def job() -> JobRecord:
    return decode(JobRecord, (JOURNALS / "16cb98f-job.json").read_bytes(), where="job")


def test_an_instance_is_what_it_was(instance: InstanceRecord) -> None:
    assert (instance.instance, instance.libvirt_name) == (UUID, "instance-0000002a")
    assert (instance.display_name, instance.owner_project) == ("Überwachung \u2028 \U0001f4be", REQUEST.project)
    assert instance.disks[0].chain == (BASE, BELOW)
    assert (instance.resized_inodes, instance.migrated_away, instance.tpm) == ((1, 2**63), True, True)
    assert instance.domain_xml.startswith("<domain>")


def test_its_owners_request_still_holds_and_came_by_the_socket(instance: InstanceRecord, job: JobRecord) -> None:
    """There was no other way to ask: so nothing that OpenStack carries overwrites it."""
    for request in (instance.request, job.source.request, *(copy.request for copy in job.copies)):
        assert request == OWNERS
        assert request is not None
        assert (request.enabled, request.refused, request.asked) == (True, "", True)
        assert request.source is RequestSource.SOCKET


def test_what_nobody_had_asked_is_not_known_and_not_taken_for_nothing(instance: InstanceRecord) -> None:
    """A rule of today that asks for it gets no answer, rather than a no."""
    assert instance.server == ServerRecord()
    tables = (instance.server.properties, instance.server.extra_specs, instance.server.image_properties)
    assert (tables, instance.server.domain, instance.server.image_heard) == ((None, None, None), None, False)
    for match in (Match(domain="d"), Match(extra_specs={"a": "b"}), Match(image_properties={"a": "b"})):
        (held,) = conditions(instance, match, Surroundings(hears_images=True))
        assert held.holds is None


def test_a_job_is_what_it_was(job: JobRecord) -> None:
    assert (job.state, job.verdict, job.rule) == (JobState.QUEUED, VerdictKind.TERMINATED, "everything")
    assert [copy.state for copy in job.copies] == [CopyState.QUEUED, CopyState.SENDING]
    assert job.files[0].identity == IDENTITY
    assert job.first_read == {f"{UUID}.disk.12": IDENTITY}


def test_a_job_was_a_terminations_and_its_copies_had_their_destinations_terms(job: JobRecord) -> None:
    assert job.occasion is Occasion.TERMINATE
    assert {copy.retention_s for copy in job.copies} == {None}


def test_what_is_written_next_is_read_again(instance: InstanceRecord, job: JobRecord) -> None:
    assert decode(InstanceRecord, encode(instance), where="again") == instance
    assert decode(JobRecord, encode(job), where="again") == job
    moved = replace(job, occasion=Occasion.REBUILD)
    assert decode(JobRecord, encode(moved), where="again") == moved


def test_what_is_new_has_a_default() -> None:
    """Without one, the first start of a new version would lose every record of the old one."""
    smallest = b'{"instance": "%s"}' % UUID.encode()
    assert decode(InstanceRecord, smallest, where="smallest") == InstanceRecord(instance=UUID)
    for kind in (Request, ServerRecord):
        assert kind() == kind(**{field.name: getattr(kind(), field.name) for field in fields(kind)})
