"""What is journaled comes back whole, or is refused with the name of the file; nothing is guessed at."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.records import BASE_RECORD, INSTANCE, JOB, REQUEST, SERVER, UUID

from autobackup.errors import Damaged, RecordDamaged, Transient
from autobackup.model import (
    Anchor,
    AttemptRecord,
    BaseRecord,
    ChainLink,
    CopyRecord,
    CopyState,
    DiskIdentity,
    DiskSource,
    HeldFile,
    InstanceRecord,
    JobRecord,
    JobState,
    Occasion,
    Protection,
    RequestSource,
    VerdictKind,
    decode,
    encode,
)

WHERE = "jobs/8d3c/job.json"


def decoded(data: bytes, kind: type[Any] = JobRecord) -> Any:
    return decode(kind, data, where=WHERE)


def damage(data: bytes, kind: type[Any] = JobRecord) -> str:
    """What `decode` says of *data*. Fails if it takes it, or breaks in any other way."""
    with pytest.raises(RecordDamaged) as caught:
        decode(kind, data, where=WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value)


def tree(record: object) -> Any:
    return json.loads(encode(record))


def edited(path: tuple[str | int, ...], value: object) -> bytes:
    """The journaled job with one value replaced."""
    root = tree(JOB)
    at = root
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return json.dumps(root).encode()


def test_the_full_records_leave_no_field_at_its_default() -> None:
    """Or the round trip below would prove less than it says."""
    for record in (
        JOB,
        INSTANCE,
        REQUEST,
        SERVER,
        JOB.files[0],
        JOB.copies[1],
        JOB.copies[1].attempt,
        INSTANCE.disks[0],
        BASE_RECORD,
    ):
        for field in dataclasses.fields(record):  # type: ignore[arg-type]
            assert getattr(record, field.name) != field.default, field.name


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("verdict", list(VerdictKind))
def test_a_job_with_everything_set_comes_back_the_same(state: JobState, verdict: VerdictKind) -> None:
    job = dataclasses.replace(JOB, state=state, verdict=verdict)
    back = decoded(encode(job))
    assert back == job
    assert type(back.state) is JobState
    assert type(back.copies) is tuple
    assert type(back.copies[0].state) is CopyState
    assert type(back.files[0].identity) is DiskIdentity


def test_an_instance_with_everything_set_comes_back_the_same() -> None:
    assert decoded(encode(INSTANCE), InstanceRecord) == INSTANCE


def test_what_is_known_of_a_base_comes_back_the_same() -> None:
    assert decoded(encode(BASE_RECORD), BaseRecord) == BASE_RECORD
    assert type(decoded(encode(JOB)).copies[0].anchors[1].protection) is Protection


def test_the_smallest_records_come_back_the_same() -> None:
    instance = InstanceRecord(instance=UUID)
    assert decoded(encode(instance), InstanceRecord) == instance
    job = dataclasses.replace(
        JOB, source=instance, files=(), copies=(), not_captured={}, first_read={}, member_digests={}, still_named=()
    )
    assert decoded(encode(job)) == job


def test_a_record_without_its_optional_keys_has_their_defaults() -> None:
    assert decoded(b'{"instance": "%s"}' % UUID.encode(), InstanceRecord) == InstanceRecord(instance=UUID)


times = st.floats(allow_nan=False, allow_infinity=False)
short = st.text(max_size=12)
links = st.builds(ChainLink, path=short, format=short)
chains = st.lists(links, max_size=2).map(tuple)
identities = st.builds(DiskIdentity, generation=st.none() | st.integers())
attempts = st.none() | st.builds(AttemptRecord, started_at_s=times)
anchors = st.lists(st.builds(Anchor), max_size=2).map(tuple)
copies = st.builds(CopyRecord, attempt=attempts, not_before_s=times, verified_at_s=st.none() | times, anchors=anchors)
sources = st.builds(
    InstanceRecord,
    disks=st.lists(st.builds(DiskSource, chain=chains), max_size=2).map(tuple),
    updated_at_s=times,
)
jobs = st.builds(
    JobRecord,
    created_at_s=times,
    updated_at_s=times,
    not_before_s=times,
    source=sources,
    files=st.lists(st.builds(HeldFile, chain=chains, identity=identities), max_size=2).map(tuple),
    copies=st.lists(copies, max_size=2).map(tuple),
    first_read=st.dictionaries(short, identities, max_size=2),
    not_captured=st.dictionaries(short, short, max_size=2),
    member_digests=st.dictionaries(short, short, max_size=2),
    still_named=st.lists(short, max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(jobs)
def test_whatever_is_journaled_comes_back_the_same(job: JobRecord) -> None:
    assert decoded(encode(job)) == job


def test_a_path_that_is_not_utf_8_does_not_make_the_record_unreadable() -> None:
    """Half a surrogate pair can be written as JSON and not be read: the job would be lost at the next start."""
    job = dataclasses.replace(JOB, last_error="cannot open '/i/\udce9t\udce9'", still_named=("/i/\udcff",))
    back = decoded(encode(job))
    assert back.last_error == "cannot open '/i/?t?'"
    assert back.job == job.job


def test_the_words_that_are_journaled_stay_what_they_are() -> None:
    """A spool outlives the version that wrote it: another word for a state is another format."""
    assert " ".join(JobState) == "queued sending verified scrubbing scrubbed kept done parked discarded"
    assert " ".join(CopyState) == "queued sending sent verified parked discarded"
    assert " ".join(VerdictKind) == "terminated alive moved replaced undecided"
    assert " ".join(Occasion) == "terminate rebuild shelve-offload"
    assert " ".join(RequestSource) == "socket server image flavor"
    assert " ".join(Protection) == "policy protected copy"


def test_a_record_is_text_for_an_operator_and_ends_with_a_newline() -> None:
    data = encode(JOB)
    assert data.endswith(b"\n}\n")
    assert b'\n "state": "parked",\n' in data


# ---- damage -------------------------------------------------------------------------------------------------


def test_a_damaged_record_parks_and_is_not_tried_again() -> None:
    assert issubclass(RecordDamaged, Damaged)
    assert not issubclass(RecordDamaged, Transient)


def test_a_record_that_was_cut_anywhere_is_refused() -> None:
    """A crash of the filesystem leaves a short file, or one of NULs."""
    data = encode(JOB)
    whole = len(data.rstrip())
    for length in range(whole):
        damage(data[:length])
    assert decoded(data[:whole]) == JOB


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4096,
        b"null",
        b"[]",
        b"7",
        b'"job"',
        b"{}",
        b"{'job': 1}",
        b"\xff\xfe{}",
        b"[" * 100_000,
        encode(JOB) + b"x",
        encode(JOB) + encode(JOB),
        encode(INSTANCE),
        encode(JOB).replace(b"zero", b"zer\xff"),
    ],
    ids=range(14),
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    damage(data)


def test_a_job_is_no_instance() -> None:
    damage(encode(JOB), InstanceRecord)


def _dicts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where there is an object in the JSON tree."""
    if isinstance(value, dict):
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in children:
        yield from _dicts(below, (*path, key))


TABLES = {("source", "server", name) for name in ("extra_specs", "image_properties", "properties")}
FREE_KEYS = {("not_captured",), ("member_digests",), ("first_read",), *TABLES}  # mappings, whose keys are data
RECORDS = [path for path in _dicts(tree(JOB)) if path not in FREE_KEYS]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: ".".join(str(part) for part in path) or "job")
def test_an_unknown_key_is_refused_in_every_record(path: tuple[str | int, ...]) -> None:
    """A newer agent's journal is not half understood: what the key meant would be lost at the next write."""
    words = damage(edited((*path, "nonsense"), 1))
    assert ".".join(str(part) for part in (*path, "nonsense")) in words


REQUIRED = {
    JobRecord: {
        "job", "instance", "state", "verdict", "verdict_reason", "rule", "scrub_method", "created_at_s", "updated_at_s",
        "source", "files", "copies",
    },
    DiskIdentity: {"device", "inode", "generation", "size_bytes", "mtime_ns"},
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(REQUIRED[JobRecord]))
def test_a_job_without_what_makes_it_one_is_refused(key: str) -> None:
    root = tree(JOB)
    del root[key]
    assert f": {key}: " in damage(json.dumps(root).encode())


@pytest.mark.parametrize("key", sorted(REQUIRED[DiskIdentity]))
def test_an_identity_is_whole_or_none(key: str) -> None:
    """A generation that is missing is not one that the filesystem does not have."""
    root = tree(JOB)
    del root["files"][0]["identity"][key]
    assert f": files.0.identity.{key}: " in damage(json.dumps(root).encode())


WRONG: list[tuple[tuple[str | int, ...], object]] = [
    (("state",), "scrubed"),
    (("state",), "QUEUED"),
    (("state",), 3),
    (("state",), None),
    (("verdict",), "dead"),
    (("copies", 0, "state"), "scrubbing"),
    (("copies", 0, "destination"), 5),
    (("copies",), {}),
    (("copies",), None),
    (("files",), "disk"),
    (("files", 0, "identity", "inode"), "12"),
    (("files", 0, "identity", "inode"), 12.5),
    (("files", 0, "identity", "inode"), True),
    (("files", 0, "identity", "inode"), None),
    (("files", 0, "identity"), None),
    (("created_at_s",), "1700000000"),
    (("created_at_s",), None),
    (("failure_count",), "3"),
    (("failure_count",), 3.5),
    (("unreadable",), "yes"),
    (("unreadable",), 1),
    (("unreadable",), None),
    (("job",), 7),
    (("source",), {}),
    (("source", "tpm"), "true"),
    (("source", "resized_inodes"), [1, "2"]),
    (("source", "disks", 0, "chain"), [["/base", "raw"]]),
    (("not_captured",), {"swtpm": 5}),
    (("first_read",), {"link": {}}),
    (("still_named",), "/i/disk"),
    (("occasion",), "reboot"),
    (("occasion",), None),
    (("copies", 0, "retention_s"), "30d"),
    (("copies", 0, "request", "source"), "letter"),
    (("copies", 0, "anchors"), None),
    (("copies", 0, "anchors", 0, "protection"), "locked"),
    (("copies", 0, "anchors", 1, "parent"), None),
    (("copies", 0, "base_attempt"), 5),
    (("copies", 0, "request", "enabled"), "true"),
    (("source", "root_inode"), "12"),
    (("source", "server"), None),
    (("source", "server", "properties"), {"autobackup": True}),
    (("source", "server", "extra_specs"), [["a", "b"]]),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=str)
def test_a_value_of_another_kind_is_refused_and_not_converted(path: tuple[str | int, ...], value: object) -> None:
    words = damage(edited(path, value))
    assert f": {path[0]}" in words
