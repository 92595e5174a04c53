"""What Keystone and Glance add to Nova's words: asked for where a rule or an owner needs it, never waited for twice."""

from pathlib import Path

from tests.flows.requesting import OWN, Told, requesting, server

from autobackup.errors import CloudUnavailable
from autobackup.model import Request, RequestSource
from autobackup.rules.policy import Rulebook
from autobackup.terms import Match, Rule

YES = {"autobackup": "true"}


async def test_an_image_is_asked_of_glance_where_its_words_count(tmp_path: Path) -> None:
    """A domain has only those properties that Nova knows; `autobackup:enabled` is not one."""
    told = Told(images={"img": {"autobackup:enabled": "true", "autobackup:retention": "2d"}})
    with requesting(tmp_path, owners=told) as host:
        instance = host.living()
        request = await host.hear(instance, image="img")
        assert request == Request(project=OWN, retention_s=172800.0, source=RequestSource.IMAGE)
        assert host.learn.known(instance).server.image_heard
        assert told.calls == ["img"], "a domain was asked for that no rule asks for"


async def test_glance_being_down_is_no_answer_and_is_not_waited_for_by_every_server(tmp_path: Path) -> None:
    told = Told(images={"img": {"autobackup:enabled": "true"}}, trouble=CloudUnavailable("Glance: no answer"))
    with requesting(tmp_path, owners=told) as host:
        servers = {one: server(one, YES, image="img") for one in (host.living() for _ in range(5))}
        await host.requests.heard(servers)
        assert len(told.calls) == 1
        for instance in servers:
            assert not host.learn.known(instance).server.image_heard
            assert host.requests.of(instance) == Request(project=OWN, source=RequestSource.SERVER)
        told.trouble = None
        await host.requests.heard(servers)
        assert all(host.learn.known(instance).server.image_heard for instance in servers)


async def test_a_domain_and_an_image_are_asked_for_where_a_rule_asks(tmp_path: Path) -> None:
    rules = [Rule(name="x", match=Match(domain="d*", image_properties={"class": "gold"}), destinations=("v",))]
    told = Told(domains={OWN: "default"}, images={"img": {"class": "gold"}})
    with requesting(tmp_path, book=Rulebook(rules=rules), owners=told) as host:
        instance = host.living()
        await host.hear(instance, image="img")
        known = host.learn.known(instance).server
        assert (known.domain, known.image_properties, known.image_heard) == ("default", {"class": "gold"}, True)
        assert sorted(told.calls) == sorted([OWN, "img"])


async def test_nobody_is_asked_for_what_nobody_needs(tmp_path: Path) -> None:
    told = Told()
    with requesting(tmp_path, book=Rulebook(), owners=told) as host:
        instance = host.living()
        await host.hear(instance, YES, image="img")
        assert told.calls == []
        assert host.learn.known(instance).server.image_heard
