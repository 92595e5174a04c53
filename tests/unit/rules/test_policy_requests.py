"""An owner's request is added to what the rules say; alone it is enough, and it never takes anything away."""

import dataclasses
from pathlib import Path

import pytest

from autobackup.config import Destination, Match, RequestSection, Rule
from autobackup.model import InstanceId, InstanceRecord, Request
from autobackup.rules.policy import plan, requested_destination

PROJECT, READER = "5f705771f3824b2ab3bd4ad10e3ee0a2", "0" * 31 + "1"
WISH = Request(project=PROJECT, reader=READER, retention_s=604800.0)
TAKEN = RequestSection(destination="owners", scrub="unlink")
INSTANCE = InstanceRecord(
    instance=InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"), domain_xml="<domain/>", request=WISH
)
RULE = Rule(name="all", destinations=("vault",), scrub="random")
OTHER = Rule(name="other", match=Match(name="nobody"), destinations=("vault",))
TEMPLATE = Destination(
    name="owners", store="glance", cloud="c", project="vault", project_domain="d", key="barbican", readers=("f" * 32,),
    retention_s=86400.0,
)  # fmt: skip


def test_alone_it_is_enough() -> None:
    wanted = plan(INSTANCE, [OTHER], TAKEN)
    assert wanted is not None
    assert (wanted.destinations, wanted.scrub_method, wanted.certain) == ((), "unlink", True)
    assert (wanted.requested, wanted.requested_name) == (WISH, f"owners.{PROJECT}")


def test_it_is_added_to_what_a_rule_says() -> None:
    wanted, by_rule = plan(INSTANCE, [RULE], TAKEN), plan(dataclasses.replace(INSTANCE, request=None), [RULE], TAKEN)
    assert wanted is not None
    assert by_rule is not None
    assert dataclasses.replace(wanted, requested=None, requested_name=None) == by_rule
    assert wanted.requested == WISH


@pytest.mark.parametrize("rules", [[], [OTHER]])
def test_without_a_destination_for_requests_it_counts_for_nothing(rules: list[Rule]) -> None:
    assert plan(INSTANCE, rules, RequestSection()) is None


def test_it_changes_the_project_the_readers_and_the_time_and_no_other_term() -> None:
    asked = requested_destination(TEMPLATE, WISH)
    assert asked == dataclasses.replace(
        TEMPLATE, project=PROJECT, project_domain="", readers=("f" * 32, READER), retention_s=604800.0
    )


def test_what_it_does_not_name_is_as_the_operator_has_it() -> None:
    asked = requested_destination(TEMPLATE, Request(project=PROJECT))
    assert (asked.readers, asked.retention_s) == (TEMPLATE.readers, TEMPLATE.retention_s)


def test_a_reader_is_named_once() -> None:
    asked = requested_destination(TEMPLATE, Request(project=PROJECT, reader="f" * 32))
    assert asked.readers == ("f" * 32,)


def test_without_barbican_nobody_can_be_named() -> None:
    template = dataclasses.replace(TEMPLATE, key="recipient", readers=(), recipients=(Path("/k.pub"),))
    assert requested_destination(template, WISH).readers == ()
