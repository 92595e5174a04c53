"""The example that is shipped, and the README: every key is there, explained, at its default."""

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.config_files import ALL_KEYS, SECTIONS, Folder, keys_of

from autobackup.config import (
    DEFAULT_PATH,
    Config,
)
from autobackup.terms import Destination, Rule

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "packaging" / "autobackup.toml.example"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- the example that is shipped ----------------------------------------------------------------------------

COMMENTED = re.compile(r"^#(?=[a-z\[])", re.MULTILINE)


@pytest.fixture(scope="module")
def example() -> str:
    return EXAMPLE.read_text("utf-8")


def _uncommented(example: str) -> Mapping[str, Any]:
    return tomllib.loads(COMMENTED.sub("", example))


def test_the_example_as_it_is_shipped_says_nothing(folder: Folder, example: str) -> None:
    """It is installed as the configuration: the agent starts with it, and captures nothing."""
    assert folder.read(example) == Config()
    assert folder.read(re.sub(r"^(?!#|$)", "#", example, flags=re.MULTILINE)) == Config()


def _without_optional(config: Config) -> Config:
    """*config* without the keys that have no default: the example shows what could stand there."""
    return dataclasses.replace(
        config,
        sealing=dataclasses.replace(config.sealing, rate_bytes=None),
        openstack=dataclasses.replace(config.openstack, clouds_yaml=None),
        request=dataclasses.replace(config.request, retention_longest_s=None, disk_at_most_bytes=None),
    )


def test_the_example_uncommented_says_every_default(folder: Folder, example: str) -> None:
    config = folder.read(COMMENTED.sub("", example))
    assert dataclasses.replace(_without_optional(config), destination=(), rule=()) == Config()
    assert config.sealing.rate_bytes is not None
    assert config.openstack.clouds_yaml is not None
    assert None not in (config.request.retention_longest_s, config.request.disk_at_most_bytes)
    for destination in config.destination:
        assert dataclasses.replace(destination, retention_s=None, rate_bytes=None) == Destination(
            name=destination.name,
            store=destination.store,
            path=destination.path,
            cloud=destination.cloud,
            key=destination.key,
            keyfile=destination.keyfile,
            recipients=destination.recipients,
        )
    (rule,) = config.rule
    assert None not in (rule.retention_s, rule.match.disk_at_least_bytes, rule.match.disk_at_most_bytes)
    assert dataclasses.replace(
        rule,
        retention_s=None,
        match=dataclasses.replace(rule.match, disk_at_least_bytes=None, disk_at_most_bytes=None),
    ) == Rule(name=rule.name, destinations=(config.destination[0].name,))


def test_the_example_shows_every_store_and_every_source_of_keys_that_needs_a_key_of_its_own(
    folder: Folder, example: str
) -> None:
    destinations = folder.read(COMMENTED.sub("", example)).destination
    assert {one.store for one in destinations} == {"directory", "glance"}
    assert {one.key for one in destinations} == {"keyfile", "barbican", "recipient"}
    assert '"none"' in example


def test_every_destination_of_the_example_can_be_uncommented_by_itself(folder: Folder, example: str) -> None:
    """They are ways to do it, not parts of one."""
    everything = folder.read(COMMENTED.sub("", example)).destination
    before, *blocks = example.split("#[[destination]]")
    for one, block in zip(everything, blocks, strict=True):
        alone = COMMENTED.sub("", "#[[destination]]" + block.partition("#[[rule]]")[0])
        assert folder.read(before + alone).destination == (one,)


def test_every_line_of_the_example_can_be_uncommented_by_itself(folder: Folder, example: str) -> None:
    """The heads of the sections are not commented: a key never lands in another table."""
    lines = example.splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("#[[")]
    for n, line in enumerate(lines[: heads[0]]):
        if COMMENTED.match(line):
            read = folder.read("\n".join([*lines[:n], line[1:], *lines[n + 1 :]]))
            assert _without_optional(read) == Config(), line


@pytest.mark.parametrize(("section", "where"), SECTIONS.items(), ids=lambda one: getattr(one, "__name__", None))
def test_every_key_appears_in_the_example(example: str, section: type, where: str) -> None:
    """No destination has all of them: not all go together."""
    tables: list[Any] = [_uncommented(example)]
    for part in where.split(".") if where else ():
        found = [table[part.removesuffix("[1]")] for table in tables]
        tables = [one for entries in found for one in entries] if part.endswith("[1]") else found
    # `match` stands last in the example, since whatever follows a table's head belongs to the table
    assert {key for table in tables for key in table} == set(keys_of(section))


def test_every_key_of_the_example_is_explained_in_one_line(example: str) -> None:
    lines = example.splitlines()
    for n, line in enumerate(lines):
        if re.match(r"#[a-z_]+ = ", line):
            assert re.match(r"# .+[.?)]|# .+: ", lines[n - 1]), line
            assert not lines[n - 2].startswith("#"), f"{line}: explained in more than one line"
        assert len(line) <= 120


def test_no_key_holds_a_secret() -> None:
    """Keys are named by file: a configuration may lie in a repository, and is printed by `check-config`."""
    for where, key in ALL_KEYS:
        assert not re.search("secret|password|token$|private", key), (where, key)


def _toml_blocks(file: Path) -> Iterator[str]:
    yield from re.findall(r"^```toml\n(.*?)^```", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_in_the_readme_loads(folder: Folder) -> None:
    blocks = list(_toml_blocks(REPOSITORY / "README.md"))
    assert blocks
    for block in blocks:
        assert folder.read(block).rule


def test_the_file_is_where_the_readme_says() -> None:
    assert f" {DEFAULT_PATH}\n" in (REPOSITORY / "README.md").read_text("utf-8")
