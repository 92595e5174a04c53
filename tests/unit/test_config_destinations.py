"""
Which keys of a `[[destination]]` go together: each row of the two tables, wrong and right, in words with the remedy.

The tables are written down here a second time, from ARCHITECTURE.md's point of view: what a store and a source of
keys cannot do without, and what would be read by nobody.
"""

import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.config_files import RULE, Folder

from autobackup.config import Config
from autobackup.configfile import load
from autobackup.errors import ConfigError
from autobackup.terms import _GOES_WITH, _NEEDS, Destination

USER = "0123456789abcdef0123456789abcdef"
STORES = ("directory", "glance")
KEYS = ("keyfile", "barbican", "recipient", "none")

NEEDED_BY_STORE = {"directory": {"path": "/srv/vault"}, "glance": {"cloud": "lab"}}
NEEDED_BY_KEY = {
    "keyfile": {"keyfile": "/k"},
    "barbican": {"cloud": "lab"},
    "recipient": {"recipients": ["/k/alice.pub"]},
    "none": {},
}
# A value that is not the default, and where it means something.
MEANT_FOR: Mapping[str, tuple[object, tuple[str, ...]]] = {
    "path": ("/srv/vault", ("directory",)),
    "must_be_mount": (True, ("directory",)),
    "reserve": ("2GiB", ("directory",)),
    "cloud": ("lab", ("glance", "barbican")),
    "project": ("vault", ("glance", "barbican")),
    "project_domain": ("backups", ("glance", "barbican")),
    "members": (["a" * 32], ("glance",)),
    "keyfile": ("/k", ("keyfile",)),
    "recipients": (["/k/alice.pub"], ("recipient",)),
    "readers": ([USER], ("barbican",)),
    "project_access": (True, ("barbican",)),
}
ANYWHERE: Mapping[str, object] = {
    "older_keyfiles": ["/k/old"],  # what an earlier source sealed must still open
    "retention": "30d",
    "verify": "readback",
    "rate": "1MiB",
    "parents": "copy",  # "protect" alone has a meaning only with store = "glance"
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else f'"{value}"'


def destination(keys: Mapping[str, object]) -> str:
    return "[[destination]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())


def whole(store: str, key: str) -> dict[str, object]:
    """The fewest keys that will do."""
    return {"name": "vault", "store": store, "key": key} | NEEDED_BY_STORE[store] | NEEDED_BY_KEY[key]


COMBINATIONS = list(itertools.product(STORES, KEYS))


def words_of(name: str) -> str:
    _, places = MEANT_FOR[name]
    return " or ".join(f'{"store" if place in STORES else "key"} = "{place}"' for place in places)


# ---- the tables -------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_program() -> None:
    needs = {("store", store, key) for store, needed in NEEDED_BY_STORE.items() for key in needed}
    needs |= {("key", source, key) for source, needed in NEEDED_BY_KEY.items() for key in needed}
    assert {(kind, word, key) for (kind, word), key in _NEEDS.items()} == needs
    goes = {name.removesuffix("_bytes"): {word for _, word in pairs} for name, pairs in _GOES_WITH.items()}
    assert goes == {name: set(places) for name, (_, places) in MEANT_FOR.items()}


def test_every_key_of_a_destination_is_in_one_of_the_tables() -> None:
    """A new one that is in none would be taken wherever it means nothing."""
    names = {name.removesuffix("_bytes").removesuffix("_s") for name in Destination.__slots__}
    assert names == {"name", "store", "key"} | set(MEANT_FOR) | set(ANYWHERE)


@pytest.mark.parametrize(("store", "key"), COMBINATIONS)
def test_any_store_goes_with_any_source_of_keys(folder: Folder, store: str, key: str) -> None:
    (read,) = folder.read(destination(whole(store, key))).destination
    assert (read.store, read.key) == (store, key)


@pytest.mark.parametrize(
    ("store", "key", "needed"), [(store, key, one) for store, key in COMBINATIONS for one in whole(store, key)]
)
def test_without_a_key_that_it_needs_a_destination_is_refused(
    folder: Folder, store: str, key: str, needed: str
) -> None:
    keys = whole(store, key)
    del keys[needed]
    line = folder.refuse_once(destination(keys))
    if needed in ("name", "store", "key"):
        assert line == f"{folder.main}: 'destination[1].{needed}' is missing; add it"
        return
    by_store = needed in NEEDED_BY_STORE[store]
    needs = f'store = "{store}"' if by_store else f'key = "{key}"'
    assert line == f"{folder.main}: destination[1].{needed}: is missing; {needs} needs it"


@pytest.mark.parametrize(
    ("key", "needed"), [("keyfile", "keyfile"), ("barbican", "cloud"), ("recipient", "recipients")]
)
def test_a_key_that_is_needed_and_empty_is_missing(folder: Folder, key: str, needed: str) -> None:
    """An empty list of recipients would seal to nobody."""
    empty: object = [] if needed == "recipients" else ""
    line = folder.refuse_once(destination(whole("directory", key) | {needed: empty}))
    assert line.startswith(f"{folder.main}: destination[1].{needed}: ")
    assert "is missing" in line or "must be an absolute path" in line


@pytest.mark.parametrize(
    ("store", "key", "name"), [(store, key, name) for store, key in COMBINATIONS for name in MEANT_FOR]
)
def test_a_key_is_taken_where_it_means_something_and_nowhere_else(
    folder: Folder, store: str, key: str, name: str
) -> None:
    """An operator who wrote `members` for a folder believes that somebody may read it."""
    value, places = MEANT_FOR[name]
    text = destination(whole(store, key) | {name: value})
    if {store, key} & set(places):
        folder.read(text)
        return
    line = folder.refuse_once(text)
    assert line == f"{folder.main}: destination[1].{name}: has a meaning only with {words_of(name)}; remove it"


@pytest.mark.parametrize(("store", "key"), COMBINATIONS)
def test_what_goes_with_everything_is_taken_everywhere(folder: Folder, store: str, key: str) -> None:
    (read,) = folder.read(destination(whole(store, key) | dict(ANYWHERE))).destination
    assert read.older_keyfiles == (Path("/k/old"),)


@pytest.mark.parametrize(("store", "key"), COMBINATIONS)
def test_a_default_that_is_written_out_is_no_mistake(folder: Folder, store: str, key: str) -> None:
    defaults = {
        "must_be_mount": False, "reserve": "1GiB", "cloud": "", "project": "", "project_domain": "", "members": [],
        "recipients": [], "readers": [], "project_access": False,
    }  # fmt: skip
    folder.read(destination(defaults | whole(store, key)))


@pytest.mark.parametrize("name", MEANT_FOR)
def test_the_second_of_two_destinations_is_held_to_the_tables_too(folder: Folder, name: str) -> None:
    """In a drop-in, and named as that file counts them."""
    value, places = MEANT_FOR[name]
    store, key = next(pair for pair in COMBINATIONS if not set(pair) & set(places))
    wrong = whole(store, key) | {name: value, "name": "other"}
    line = folder.refuse_once(destination(whole("directory", "none")), more=destination(wrong))
    assert line.startswith(f"{folder.drop_in('more')}: destination[1].{name}: has a meaning only with ")


def test_a_destination_in_a_cloud_arrives_in_its_fields(folder: Folder) -> None:
    text = destination(
        whole("glance", "barbican")
        | {"project": "vault", "project_domain": "backups", "members": ["a" * 32, "b" * 32], "readers": [USER],
           "project_access": True, "retention": "1w", "verify": "readback", "rate": "10MiB"}
    )  # fmt: skip
    (read,) = folder.read(text + RULE).destination
    assert read == Destination(
        name="vault", store="glance", key="barbican", cloud="lab", project="vault", project_domain="backups",
        members=("a" * 32, "b" * 32), readers=(USER,), project_access=True, retention_s=604800, verify="readback",
        rate_bytes=10 << 20,
    )  # fmt: skip
    assert read.path is None


# ---- parents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "key"), COMBINATIONS)
@pytest.mark.parametrize("word", ["auto", "copy", "protect"])
def test_only_where_there_are_images_can_they_be_asked_for(folder: Folder, store: str, key: str, word: str) -> None:
    """An operator who wrote "protect" for a folder believes that no copy of a base lies in it."""
    text = destination(whole(store, key) | {"parents": word})
    if (store, word) != ("directory", "protect"):
        assert folder.read(text).destination[0].parents == word
        return
    line = folder.refuse_once(text)
    words = 'is "protect", which has a meaning only with store = "glance"; remove it'
    assert line == f"{folder.main}: destination[1].parents: {words}"


def test_left_out_the_parents_are_kept_as_is_best(folder: Folder) -> None:
    assert folder.read(destination(whole("glance", "barbican"))).destination[0].parents == "auto"


# ---- readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [USER, "f" * 32, "0" * 64, USER * 2])
def test_a_reader_is_the_id_of_a_user(folder: Folder, user: str) -> None:
    text = destination(whole("glance", "barbican") | {"readers": [user]})
    assert folder.read(text).destination[0].readers == (user,)


@pytest.mark.parametrize(
    "user",
    ["", "alice", "alice@example.org", USER.upper(), USER[:-1], USER + "0", "0" * 63, "0" * 65, f" {USER}",
     USER + "\\n", "01234567-89ab-cdef-0123-456789abcdef", "g" * 32, "٣" * 32],
)  # fmt: skip
def test_a_name_is_not_taken_for_a_reader(folder: Folder, user: str) -> None:
    """Barbican takes any text for an access list: whoever was meant could open nothing, and nobody would know."""
    line = folder.refuse_once(destination(whole("glance", "barbican") | {"readers": [USER, user]}))
    assert line.startswith(f"{folder.main}: destination[1].readers[2]: ")
    assert "is not the id of a user" in line
    assert "openstack user show -f value -c id" in line


@pytest.mark.parametrize("project", [USER, "f" * 32])
def test_a_member_is_the_id_of_a_project(folder: Folder, project: str) -> None:
    text = destination(whole("glance", "barbican") | {"members": [project]})
    assert folder.read(text).destination[0].members == (project,)


@pytest.mark.parametrize(
    "project", ["", "default", "a" * 31, "a" * 33, "0" * 64, "A" * 32, "g" * 32, f" {USER}", USER + "\\n", "٣" * 32]
)
def test_a_name_is_not_taken_for_a_member(folder: Folder, project: str) -> None:
    """Glance shares an image with any text: whoever was meant would see nothing, and nobody would know."""
    line = folder.refuse_once(destination(whole("glance", "barbican") | {"members": [USER, project]}))
    assert line.startswith(f"{folder.main}: destination[1].members[2]: ")
    assert "is not the id of a project" in line
    assert "openstack project show -f value -c id" in line


# ---- hostile text -----------------------------------------------------------------------------------------------

NAMES = [*MEANT_FOR, *ANYWHERE, "name", "store", "key", "destination", "rule", "sealing", "openstack", "match", "x", ""]
VALUES = st.recursive(
    st.one_of(
        st.integers(),
        st.floats(),
        st.booleans(),
        st.text(max_size=12),
        st.sampled_from([*STORES, *KEYS, "vault", "1MiB", "30s", "\0", "/\0", "\ud7ff", "9" * 400 + "s", "zstd:-1"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
SPECIAL = {"\\": "\\\\", '"': '\\"'}


def written(value: object) -> str:
    """TOML, inline."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)} = {written(one)}" for key, one in value.items()) + "}"
    plain = (SPECIAL.get(c, c if " " <= c < "\x7f" else f"\\U{ord(c):08x}") for c in str(value))
    return '"' + "".join(plain) + '"'


def _outcome(path: Path) -> Config | str:
    """What `load` makes of it: a configuration, or a refusal in words that name a file. Anything else is raised."""
    try:
        return load(path)
    except ConfigError as exc:
        return str(exc)


ODD: list[object] = [0, -1, 2**63 - 1, float("inf"), True, "", "\0", [], [[]], {}, {"": 1}]


@pytest.mark.parametrize(("name", "value"), list(itertools.product(NAMES, ODD)))
def test_no_value_of_a_destination_ends_the_program(folder: Folder, name: str, value: object) -> None:
    keys = {key: written(one) for key, one in whole("directory", "keyfile").items()} | {written(name): written(value)}
    if name in whole("directory", "keyfile"):
        del keys[name]
    text = "[[destination]]\n" + "".join(f"{key} = {one}\n" for key, one in keys.items())
    tomllib.loads(text)  # or the case shows nothing
    outcome = _outcome(folder.write(text))
    assert isinstance(outcome, Config) or outcome.startswith(f"{folder.main}: ")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=st.dictionaries(st.sampled_from([name for name in NAMES if name]), VALUES, max_size=5))
def test_no_text_ends_the_program(folder: Folder, tables: dict[str, object]) -> None:
    """Valid TOML of any shape under the names that it knows: a configuration or a refusal, never a traceback."""
    text = "".join(f"{written(key)} = {written(value)}\n" for key, value in tables.items())
    outcome = _outcome(folder.write(text))
    assert isinstance(outcome, Config) or outcome.startswith(f"{folder.main}: ")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_no_bytes_end_the_program(folder: Folder, data: bytes) -> None:
    folder.main.write_bytes(data)
    outcome = _outcome(folder.main)
    assert isinstance(outcome, Config) or outcome.startswith(f"{folder.main}: ")


@pytest.mark.parametrize("depth", [100, 5_000])
def test_no_nesting_ends_the_program(folder: Folder, depth: int) -> None:
    """tomllib recurses."""
    for text in (
        "x = " + "[" * depth + "]" * depth,
        "x = " + "{a=" * depth + "1" + "}" * depth,
        ".".join("a" * depth) + "=1",
    ):
        outcome = _outcome(folder.write(text))
        assert isinstance(outcome, str)
        assert outcome.startswith(f"{folder.main}: ")
