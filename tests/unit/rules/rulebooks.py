"""What the tests of the rules share: instances of which more or less is known, and rules in one line."""

from typing import Literal

from autobackup.model import InstanceId, InstanceRecord, Occasion, ServerRecord
from autobackup.rules.policy import Plan, Rulebook, plan
from autobackup.terms import Match, Rule

UUID = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
PROJECT = "5f705771f3824b2ab3bd4ad10e3ee0a2"
WEB = InstanceRecord(
    instance=UUID,
    libvirt_name="instance-0000002a",
    display_name="Web-01",
    owner_project=PROJECT,
    server=ServerRecord(
        project_name="Finance",
        user="4d" * 16,
        user_name="Alice",
        domain="default",
        flavor="m1.small",
        extra_specs={"hw:mem_page_size": "large", "class": "gold-1"},
        image="155d900f-4e14-4e4c-a73d-069cbf4541e6",
        image_properties={"os_distro": "debian", "hw_disk_bus": "virtio"},
        properties={},
    ),
    domain_xml="<domain/>",
)
PLAIN = InstanceRecord(  # libvirt without a cloud
    instance=UUID,
    libvirt_name="builder",
    server=ServerRecord(domain="", extra_specs={}, image_properties={}, properties={}),
    domain_xml="<domain/>",
)
UNSEEN = InstanceRecord(instance=UUID)  # lived and died while nobody looked


def rule(
    name: str = "r", *, match: Match | None = None, destinations: tuple[str, ...] = ("vault",), scrub: str = "zero"
) -> Rule:
    return Rule(name=name, match=match or Match(), destinations=destinations, scrub=scrub)


def by(
    instance: InstanceRecord,
    *rules: Rule,
    mode: Literal["first-match", "additive"] = "first-match",
    occasion: Occasion = Occasion.TERMINATE,
    disk_bytes: int | None = None,
) -> Plan | None:
    """The plan for *instance* by *rules* alone."""
    return plan(instance, Rulebook(rules=rules, mode=mode), occasion=occasion, disk_bytes=disk_bytes)


def places(plan: Plan | None) -> tuple[str, ...]:
    """Where its copies go."""
    return () if plan is None else tuple(copy.destination for copy in plan.copies)
