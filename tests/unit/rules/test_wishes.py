"""What owners write on servers, images and flavors: who is heard, what it means, and what a wrong word is told."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.rules.rulebooks import UUID

from autobackup.model import InstanceRecord, Request, RequestSource, ServerRecord
from autobackup.rules.wishes import described, retention_of, wish_of, within_caps
from autobackup.terms import RequestSection

OWN, OTHER, USER = "a" * 32, "b" * 32, "c" * 32
DAY = 86400.0
ALL = tuple(RequestSource)
TABLES = {
    RequestSource.SERVER: "properties",
    RequestSource.IMAGE: "image_properties",
    RequestSource.FLAVOR: "extra_specs",
}
TAKEN = RequestSection(destination="owners")


def words(source: RequestSource, **said: str) -> dict[str, str]:
    """As an owner writes them: on a server a property has no colon, since `--property` takes the first for an end."""
    if source is RequestSource.SERVER:
        return {"autobackup" if key == "enabled" else f"autobackup_{key}": value for key, value in said.items()}
    return {f"autobackup:{key}": value for key, value in said.items()}


def record(project: str = OWN, **tables: Any) -> InstanceRecord:
    return InstanceRecord(instance=UUID, owner_project=project, server=ServerRecord(**tables))


def speaking(source: RequestSource, words: Mapping[str, str], *, own: str = OWN) -> InstanceRecord:
    tables: dict[str, Any] = {TABLES[source]: words}
    return record(own, **tables)


def said(source: RequestSource, *, own: str = OWN, **said: str) -> Request:
    """What is heard where *source* alone speaks."""
    wish = wish_of(speaking(source, words(source, **said), own=own), ALL)
    assert wish is not None
    assert wish.source is source
    return wish


# ---- who is heard ---------------------------------------------------------------------------------------------------


def test_who_says_nothing_has_no_wish() -> None:
    assert wish_of(InstanceRecord(instance=UUID), ALL) is None
    assert wish_of(record(properties={}, image_properties={}, extra_specs={}), ALL) is None


@pytest.mark.parametrize("source", TABLES)
def test_the_terms_alone_are_no_wish(source: RequestSource) -> None:
    """An image may say for how long, and leave it to the server whether."""
    terms = words(source, project=OTHER, user=USER, retention="30d")
    assert wish_of(speaking(source, terms), ALL) is None


@pytest.mark.parametrize("source", TABLES)
def test_the_words_of_one_place_are_none_in_another(source: RequestSource) -> None:
    for other in TABLES:
        spoken = wish_of(speaking(source, words(other, enabled="true")), ALL)
        same = (source is RequestSource.SERVER) is (other is RequestSource.SERVER)
        assert (spoken is not None) is same


def test_the_first_that_has_a_word_decides_among_those_that_are_listened_to() -> None:
    """Every set of speakers, every set of listened to, and either answer."""
    order = [RequestSource.SERVER, RequestSource.IMAGE, RequestSource.FLAVOR]
    for spoken in itertools.product(("true", "false", None), repeat=3):
        heard = dict(zip(order, spoken, strict=True))
        tables: dict[str, Any] = {TABLES[one]: words(one, enabled=word) if word else {} for one, word in heard.items()}
        for count in range(len(ALL) + 1):
            for sources in itertools.permutations(ALL, count):
                wish = wish_of(record(**tables), sources)
                first = next((one for one in order if one in sources and heard[one]), None)
                assert (None if wish is None else wish.source) is first
                assert wish is None or wish.enabled is (heard[wish.source] == "true")


def test_what_one_place_leaves_out_is_not_taken_from_another() -> None:
    """An image's maker and a server's owner are two people."""
    tables: dict[str, Any] = {
        "properties": words(RequestSource.SERVER, enabled="true"),
        "image_properties": words(RequestSource.IMAGE, enabled="true", project=OTHER, user=USER, retention="1d"),
    }
    assert wish_of(record(**tables), ALL) == Request(project=OWN, source=RequestSource.SERVER)


# ---- what it means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", TABLES)
def test_a_whole_wish(source: RequestSource) -> None:
    wish = said(source, enabled="true", project=OTHER, user=USER, retention="1d 12h")
    assert wish == Request(project=OTHER, reader=USER, retention_s=1.5 * DAY, enabled=True, source=source)


@pytest.mark.parametrize("source", TABLES)
def test_what_is_left_out_is_the_instances_own_project_no_reader_and_the_operators_time(source: RequestSource) -> None:
    assert said(source, enabled="true") == Request(project=OWN, source=source)
    assert said(source, enabled="true", project=" ", user="", retention=" ") == Request(project=OWN, source=source)


@pytest.mark.parametrize("source", TABLES)
@pytest.mark.parametrize("word", ["true", "True", "TRUE", "yes", "Yes", "on", "1", " true "])
def test_a_yes(source: RequestSource, word: str) -> None:
    assert said(source, enabled=word).enabled
    assert not said(source, enabled=word).refused


@pytest.mark.parametrize("source", TABLES)
@pytest.mark.parametrize("word", ["false", "False", "FALSE", "no", "No", "off", "0", " false"])
def test_a_no(source: RequestSource, word: str) -> None:
    """Whatever else is said: there is nothing to be wrong about."""
    wish = said(source, enabled=word, project="?", user="?", retention="?")
    assert (wish.enabled, wish.refused) == (False, "")


# ---- what cannot be understood --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", TABLES)
@pytest.mark.parametrize("word", ["", " ", "ture", "yess", "2", "enabled", "ja", "none", "true false", "y", "\x1b[31m"])
def test_what_is_neither_yes_nor_no_is_refused_with_the_words_to_write(source: RequestSource, word: str) -> None:
    """Silence would be taken for a yes."""
    wish = said(source, enabled=word)
    switch = "autobackup" if source is RequestSource.SERVER else "autobackup:enabled"
    assert wish.refused == f"{switch} must be true or false, not {word!r}"
    assert wish.enabled


@pytest.mark.parametrize("source", TABLES)
@pytest.mark.parametrize("word", ["30", "30 days", "1y", "-1d", "0s", "999ms", "36526d", "for ever", "1d 2"])
def test_a_time_that_is_none_is_refused_with_what_to_write(source: RequestSource, word: str) -> None:
    wish = said(source, enabled="true", retention=word)
    key = "autobackup_retention" if source is RequestSource.SERVER else "autobackup:retention"
    assert wish.refused.startswith(f"{key}: ")
    assert "write numbers with ms, s, m, h, d or w" in wish.refused or "must be 1s to 36525d" in wish.refused


@pytest.mark.parametrize(("word", "kept_s"), [("1s", 1.0), ("36525d", 36525 * DAY), ("1000ms", 1.0), ("2w", 14 * DAY)])
def test_the_limits_of_a_time_belong_to_it(word: str, kept_s: float) -> None:
    assert retention_of(word) == kept_s
    assert said(RequestSource.SERVER, enabled="true", retention=word).retention_s == kept_s


def test_a_long_word_is_not_repeated_whole() -> None:
    wish = said(RequestSource.SERVER, enabled="x" * 10_000)
    assert len(wish.refused) < 200


@given(st.text(), st.text(), st.text(), st.text())
def test_no_words_break_it(enabled: str, project: str, user: str, retention: str) -> None:
    """And what it lets pass has ids in it, or is refused, or is a no."""
    for source in TABLES:
        wish = within_caps(
            said(source, enabled=enabled, project=project, user=user, retention=retention), TAKEN
        )  # fmt: skip
        if wish.enabled and not wish.refused:
            assert len(wish.project) == 32
            assert wish.reader == "" or len(wish.reader) in (32, 64)
            assert set(wish.project + wish.reader) <= set("0123456789abcdef")
        assert described(wish)


# ---- within what the operator lets it be ----------------------------------------------------------------------------

WISH = Request(project=OWN, reader=USER, retention_s=30 * DAY, source=RequestSource.SERVER)


def test_what_is_within_every_limit_is_as_it_was() -> None:
    caps = replace(TAKEN, sources=(RequestSource.SERVER,), projects=(OTHER, OWN), retention_longest_s=30 * DAY)
    assert within_caps(WISH, caps) == WISH
    assert within_caps(WISH, TAKEN) == WISH


def test_without_a_destination_every_one_is_refused() -> None:
    assert "request.destination" in within_caps(WISH, RequestSection()).refused


def test_who_is_not_listened_to_is_refused() -> None:
    for source, listened in itertools.product(ALL, repeat=2):
        request = within_caps(replace(WISH, source=source), replace(TAKEN, sources=(listened,)))
        assert bool(request.refused) is (source is not listened)
        assert not request.refused or str(source) in request.refused


@pytest.mark.parametrize("field", ["project", "reader"])
@pytest.mark.parametrize(
    "value",
    [
        "demo",
        "A" * 32,
        "a" * 31,
        "a" * 33,
        "a" * 63,
        "g" * 32,
        f"{'a' * 32}\n",
        "../secrets",
        "d1e3a2b1-0000",
        "\u0661" * 32,
    ],
)
def test_what_is_no_id_is_refused_and_named(field: str, value: str) -> None:
    """Glance and Barbican take any text for one, unseen."""
    named: dict[str, Any] = {field: value}
    request = within_caps(replace(WISH, **named), TAKEN)
    assert "hex digits" in request.refused
    assert repr(value) in request.refused
    assert ("user" if field == "reader" else "project") in request.refused


def test_users_of_ldap_have_longer_ids_and_projects_have_not() -> None:
    assert not within_caps(replace(WISH, reader="c" * 64), TAKEN).refused
    assert within_caps(replace(WISH, project="c" * 64), TAKEN).refused


def test_an_instance_whose_project_nobody_knows_can_have_no_default() -> None:
    wish = within_caps(said(RequestSource.SERVER, own="", enabled="true"), TAKEN)
    assert "no project is named" in wish.refused
    named = within_caps(said(RequestSource.SERVER, own="", enabled="true", project=OTHER), TAKEN)
    assert (named.project, named.refused) == (OTHER, "")


def test_only_the_projects_of_the_list_may_be_named() -> None:
    """The owner's own is no exception: it is named by default."""
    listed = replace(TAKEN, projects=(OTHER,))
    assert OWN in within_caps(WISH, listed).refused
    assert not within_caps(replace(WISH, project=OTHER), listed).refused


@pytest.mark.parametrize(
    ("asked_s", "longest_s", "kept_s"),
    [
        (None, None, None),
        (5 * DAY, None, 5 * DAY),
        (None, 5 * DAY, 5 * DAY),
        (4 * DAY, 5 * DAY, 4 * DAY),
        (5 * DAY, 5 * DAY, 5 * DAY),
        (6 * DAY, 5 * DAY, 5 * DAY),
    ],
)
def test_a_longer_time_or_none_becomes_the_longest(
    asked_s: float | None, longest_s: float | None, kept_s: float | None
) -> None:
    request = within_caps(replace(WISH, retention_s=asked_s), replace(TAKEN, retention_longest_s=longest_s))
    assert (request.retention_s, request.refused) == (kept_s, "")


def test_a_refusal_keeps_its_reason_and_what_was_asked() -> None:
    refused = replace(WISH, refused="autobackup must be true or false, not 'ture'")
    assert within_caps(refused, RequestSection()) == refused
    again = within_caps(replace(WISH, project="demo"), TAKEN)
    assert (again.project, again.reader, again.retention_s) == ("demo", USER, 30 * DAY)


@pytest.mark.parametrize("source", TABLES)
def test_a_no_needs_no_consent_and_no_destination(source: RequestSource) -> None:
    no = Request(enabled=False, source=source)
    assert within_caps(no, RequestSection()) == no


# ---- in words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(enabled=False, source=RequestSource.FLAVOR), ("flavor", "no backup")),
        (WISH, ("server", OWN, USER, "30d")),
        (Request(project=OWN), ("socket", OWN)),
        (replace(WISH, refused="it has not consented"), ("server", OWN, "refused: it has not consented")),
        (Request(source=RequestSource.IMAGE, refused="not so"), ("image", "?", "refused: not so")),
    ],
)
def test_a_wish_is_described_with_all_that_it_says(request_: Request, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in described(request_)
    assert ("refused" in described(request_)) is bool(request_.refused)


def test_a_wish_that_waits_for_its_project_is_said_to() -> None:
    assert "not been asked yet" in described(replace(WISH, asked=False))
    assert "not been asked yet" not in described(WISH)
