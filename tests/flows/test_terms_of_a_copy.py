"""How long a copy is kept: as its rule says, or else as its destination does; written into its bundle for good."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.requesting import OTHER, OWN, USER, requesting
from tests.flows.rig import Rig, rig_on

from autobackup.container.header import HEADER_BYTES, decode
from autobackup.errors import Refused
from autobackup.flows.places import Places
from autobackup.model import CopyRecord, DestinationName, JobRecord, Request

DAY = 86400.0


def expires_after_s(rig: Rig) -> int | None:
    (attempt,) = rig.doors["one"].held()
    header = decode((rig.doors["one"].root / f"{attempt}.autobackup").read_bytes()[:HEADER_BYTES])
    return None if header.expires_at_s is None else header.expires_at_s - header.created_at_s


def with_own(rig: Rig, retention_s: float | None) -> None:
    """The destination keeps for *retention_s*."""
    opened = rig.places.all()[DestinationName("one")]
    terms = replace(opened.destination, retention_s=retention_s)
    rig.places = Places([terms], lambda one: replace(opened, destination=one))


@pytest.mark.parametrize(
    ("own_s", "rules_s", "kept_s"),
    [(None, None, None), (30 * DAY, None, 30 * DAY), (None, 7 * DAY, 7 * DAY), (30 * DAY, 7 * DAY, 7 * DAY),
     (7 * DAY, 30 * DAY, 30 * DAY)],
)  # fmt: skip
async def test_a_bundle_is_kept_as_its_rule_says_or_its_destination(
    tmp_path: Path, own_s: float | None, rules_s: float | None, kept_s: float | None
) -> None:
    with rig_on(tmp_path) as rig:
        with_own(rig, own_s)
        record = await rig.new_job({"disk": b"disk"}, retention_s=rules_s)
        await rig.run_to_the_end(record.job)
        assert expires_after_s(rig) == kept_s


async def test_the_rules_time_is_kept_over_a_start(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": b"disk"}, retention_s=7 * DAY)
        assert _copies(record) == [("one", 7 * DAY)]
    with rig_on(tmp_path) as again:
        assert _copies(again.jobs.get(record.job)) == [("one", 7 * DAY)]
        await again.run_to_the_end(record.job)
        assert expires_after_s(again) == 7 * DAY


def _copies(record: JobRecord) -> list[tuple[str, float | None]]:
    return [(copy.destination, copy.retention_s) for copy in record.copies]


async def test_the_receipt_names_the_occasion_and_the_request(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": b"disk"})
        await rig.run_to_the_end(record.job)
        words = json.loads((Path(rig.spool.path) / "receipts" / f"{record.job}.json").read_bytes())
        assert words["occasion"] == "terminate"
        assert [copy["request"] for copy in words["copies"]] == [None]


# ---- an owner's -----------------------------------------------------------------------------------------------------


async def test_an_owners_copy_has_the_terms_of_its_request(tmp_path: Path) -> None:
    with requesting(tmp_path) as host:
        for request, kept_s, readers in (
            (Request(project=OWN), DAY, ()),
            (Request(project=OTHER, reader=USER, retention_s=9 * DAY), 9 * DAY, (USER,)),
        ):
            copy = CopyRecord(destination=DestinationName(f"owners.{request.project}"), request=request)
            terms = host.places.of(copy).destination
            assert (terms.project, terms.retention_s, terms.readers) == (request.project, kept_s, readers)


async def test_two_owners_of_one_project_who_differ_in_the_time_alone_share_its_session(tmp_path: Path) -> None:
    with requesting(tmp_path) as host:
        template = DestinationName("owners")
        for days in (1, 2, 3):
            place = host.places.requested(template, Request(project=OWN, retention_s=days * DAY))
            assert place.destination.retention_s == days * DAY
        assert len(host.opened) == 1
        host.places.requested(template, Request(project=OWN, reader=USER))
        assert len(host.opened) == 2, "whom a key is for is its source's to know"


async def test_a_copy_whose_destination_is_gone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with requesting(tmp_path) as host:
        for copy in (
            CopyRecord(destination=DestinationName("gone")),
            CopyRecord(destination=DestinationName(f"gone.{OWN}"), request=Request(project=OWN)),
        ):
            with pytest.raises(Refused, match="put it back, or discard it"):
                host.places.of(copy)
