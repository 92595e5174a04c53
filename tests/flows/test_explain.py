"""`autobackup explain`, asked of a real agent over its socket: which rule, why, and what would be done."""

from pathlib import Path
from textwrap import dedent

import pytest
from tests.flows.explaining import explaining, write

from autobackup.model import Request, RequestSource, ServerRecord

# sdnotify leaves its socket open where there is no systemd to talk to
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

WEB = "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"
OWN = "5e" * 16
RULES = """
[[rule]]
name = "scratch"
exclude = true
[rule.match]
name = "tmp-*"
[[rule]]
name = "gold"
on = ["terminate", "rebuild"]
destinations = ["vault"]
retention = "90d"
disks = ["root", "swap"]
[rule.match]
flavor = "m1.*"
disk_at_least = "1MiB"
[[rule]]
name = "rest"
destinations = ["vault"]
scrub = "random"
"""


async def test_one_instance_is_explained_rule_by_rule(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1", uuid_=WEB, disk_bytes=2 << 20)
        said = await host.says("web-1")
        assert said == dedent(
            f"""\
            web-1  {WEB}; its root disk occupies 2.0 MiB

            rule 'scratch' excludes: no
                no             name is tmp-*   (it is: web-1 / i)
            rule 'gold' applies: yes, on terminate and rebuild
                yes            flavor is m1.*   (it is: m1.small)
                yes            disk_at_least is 1.0 MiB   (it is: 2.0 MiB)
            rule 'rest' applies: yes, but an earlier rule has decided
                it has no conditions

            its owner has asked for nothing

            on terminate:       into vault (for 90d); root, swap; then zero (by gold)
            on rebuild:         into vault (for 90d); root, swap; then let go, not overwritten (by gold)
            on shelve-offload:  not backed up
            """
        )


async def test_one_that_is_excluded_and_one_of_which_a_fact_is_missing(tmp_path: Path) -> None:
    rules = RULES.replace('name = "tmp-*"', 'domain = "test"')
    async with explaining(tmp_path, rules) as host:
        instance = await host.lives("tmp-1")
        said = await host.says("tmp-1")
        assert "rule 'scratch' excludes: cannot be told" in said
        assert "cannot be told domain is test   (it is: not known)" in said
        assert "on terminate:       an operator will be asked: rule 'scratch' asks for domain" in said
        await host.told(instance, ServerRecord(domain="test"))
        said = await host.says("tmp-1")
        assert "rule 'scratch' excludes: yes" in said
        assert "on terminate:       not backed up" in said


async def test_an_empty_configuration_backs_nothing_up_and_says_so(tmp_path: Path) -> None:
    async with explaining(tmp_path, "") as host:
        await host.lives("web-1")
        said = await host.says("web-1")
        assert "There is no [[rule]]." in said
        assert said.count("not backed up") == 3


async def test_an_owners_request_is_shown_with_what_became_of_it(tmp_path: Path) -> None:
    async with explaining(tmp_path, "") as host:
        instance = await host.lives("web-1")
        wish = Request(project=OWN, retention_s=86400.0, source=RequestSource.SERVER)
        await host.agent.learn.set_request(instance, wish)
        said = await host.says("web-1")
        assert f"asked by server: into project {OWN}, for 1d" in said
        assert f"on terminate:       into owners.{OWN} (for 1d);" in said
        refused = Request(project=OWN, source=RequestSource.SERVER, refused="project 5e has not consented")
        await host.agent.learn.set_request(instance, refused)
        said = await host.says("web-1")
        assert "not heeded: project 5e has not consented" in said
        assert "on terminate:       not backed up" in said


async def test_that_an_owner_was_not_heard_yet_is_said_where_nova_is_asked(tmp_path: Path) -> None:
    head = 'verdict = "nova"\nnova = { cloud = "lab", host = "here" }'
    async with explaining(tmp_path, "", head=head) as host:
        instance = await host.lives("web-1")
        assert "has not been heard yet" in await host.says("web-1")
        await host.told(instance, ServerRecord(properties={}, image_heard=True))
        assert "its owner has asked for nothing" in await host.says("web-1")


# ---- all of them ----------------------------------------------------------------------------------------------------


async def test_every_instance_has_a_line(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1", disk_bytes=2 << 20)
        await host.lives("tmp-1")
        await host.lives("db-1", project="Sales")
        lines = (await host.says("--dry-run")).splitlines()
        assert " ".join(lines[0].split()) == "instance name project rule on goes to disks owner's request"
        web, tmp, db = (next(line for line in lines if name in line) for name in ("web-1", "tmp-1", "db-1"))
        assert web.split(maxsplit=2)[2].split("  ")[0] == "Finance"
        for words in ("gold", "terminate, rebuild", "vault (for 90d)", "root, swap"):
            assert words in web
        assert "none: not backed up" in tmp
        for words in ("Sales", "rest", "vault (for 30d)", "root, ephemeral, swap, config-drive"):
            assert words in db
        assert len(lines) == 4


async def test_no_instances_is_said(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        assert await host.says("--dry-run") == "No instances are held on this host.\n"
        assert await host.tells("--dry-run") == []


# ---- for programs ---------------------------------------------------------------------------------------------------


async def test_json_has_every_rule_every_condition_and_every_occasion(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1", uuid_=WEB, disk_bytes=2 << 20)
        told = await host.tells("web-1")
        assert told.keys() == {"instance", "name", "rules", "request", "request_not_heeded", "plans"}
        assert (told["instance"], told["name"], told["request"]) == (WEB, "web-1", None)
        assert [rule["rule"] for rule in told["rules"]] == ["scratch", "gold", "rest"]
        assert [rule["applies"] for rule in told["rules"]] == [False, True, True]
        assert [rule["decided_earlier"] for rule in told["rules"]] == [False, False, True]
        assert told["rules"][0]["conditions"] == [
            {"key": "name", "wanted": "tmp-*", "found": "web-1 / i", "holds": False}
        ]
        assert told["plans"].keys() == {"terminate", "rebuild", "shelve-offload"}
        assert told["plans"]["shelve-offload"] is None
        plan = told["plans"]["terminate"]
        assert (plan["rule"], plan["certain"], plan["missing"], plan["scrub"]) == ("gold", True, "", "zero")
        assert plan["disks"] == ["root", "swap"]
        (copy,) = plan["copies"]
        assert (copy["destination"], copy["retention_s"]) == ("vault", 90 * 86400.0)


async def test_a_fact_that_is_missing_is_null_in_json(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES.replace('name = "tmp-*"', 'domain = "test"')) as host:
        await host.lives("web-1")
        told = await host.tells("web-1")
        assert told["rules"][0]["applies"] is None
        assert told["rules"][0]["conditions"][0]["holds"] is None
        assert not told["plans"]["terminate"]["certain"]
        assert "domain" in told["plans"]["terminate"]["missing"]


async def test_every_line_is_an_object_in_json(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1")
        (row,) = await host.tells("--dry-run")
        assert row.keys() >= {"instance", "name", "project", "rule", "on", "goes to", "disks", "owner's request"}


# ---- rules that are tried -------------------------------------------------------------------------------------------


async def test_rules_of_another_file_are_tried_and_said_not_to_be_the_agents(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1")
        other = write(tmp_path, RULES.replace('"rest"', '"tried"'), name="other.toml")
        for file, differs in ((host.file, False), (other, True)):
            result = await host.explain("web-1", config=file)
            assert result.exit_code == 0
            assert (str(file) in result.stderr) is differs
            assert ("the agent does not run with the rules of" in result.stderr) is differs
            assert ("'tried' applies: yes" in result.stdout) is differs
            assert "note" not in result.stdout


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ('scrub = "random"', 'scrub = "unlink"', True),
        ("m1.*", "m2.*", True),
        ('retention = "90d"', 'retention = "91d"', True),
        ("[[rule]]", "# a comment\n[[rule]]", False),
        ('retention = "90d"', 'retention = "2160h"', False),
    ],
)
async def test_it_is_the_rules_that_count_and_not_the_text(tmp_path: Path, old: str, new: str, differs: bool) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1")
        file = write(tmp_path, RULES.replace(old, new, 1), name="other.toml")
        result = await host.explain("--dry-run", config=file)
        assert bool(result.stderr) is differs


# ---- which instance -------------------------------------------------------------------------------------------------


async def test_an_instance_is_named_by_its_id_the_start_of_one_or_its_name(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives("web-1", uuid_=WEB)
        await host.lives("web-2", uuid_=WEB.replace("6a0b", "6a0c"))
        for words in (WEB, "6a0b", "web-1"):
            assert (await host.says(words)).startswith(f"web-1  {WEB}")


async def test_one_that_is_not_here_and_one_that_is_two_are_refused_with_what_to_do(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        first, second = await host.lives("web", uuid_=WEB), await host.lives("web", uuid_=WEB.replace("6a0b", "6a0c"))
        for words in ("db", "web-", "WEB", "6b"):
            result = await host.explain(words)
            assert (result.exit_code, result.stdout) == (3, "")
            assert "--dry-run" in result.stderr
        for words in ("web", "6a0"):
            result = await host.explain(words)
            assert (result.exit_code, result.stdout) == (3, "")
            assert first in result.stderr
            assert second in result.stderr


async def test_which_of_the_two_is_meant_must_be_said(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        for arguments in ((), ("web-1", "--dry-run")):
            result = await host.explain(*arguments)
            assert result.exit_code == 2
            assert "--dry-run" in result.stderr


async def test_an_agent_that_does_not_answer_is_an_error_of_its_own(tmp_path: Path) -> None:
    async with explaining(tmp_path, RULES) as host:
        (tmp_path / "agent.sock").rename(tmp_path / "moved.sock")
        result = await host.explain("--dry-run")
        assert result.exit_code == 5
        assert "is autobackup-agent running?" in result.stderr
        (tmp_path / "moved.sock").unlink()


# ---- words of others ------------------------------------------------------------------------------------------------

EVIL = "\u009b31m\u202eweb[/db] [bold]x[/bold] :smile:"


@pytest.mark.parametrize("fmt", ["table", "value"])
async def test_no_name_speaks_to_the_terminal_or_breaks_the_list(tmp_path: Path, fmt: str) -> None:
    async with explaining(tmp_path, RULES) as host:
        await host.lives(EVIL, uuid_=WEB, project=EVIL, flavor=f"m1.{EVIL}")
        for arguments in (("--dry-run",), (WEB,)):
            said = await host.says(*arguments, "-f", fmt)
            assert all(letter.isprintable() or letter == "\n" for letter in said)
            assert "[/db] [bold]x[/bold] :smile:" in said


async def test_no_word_of_others_makes_a_line_of_its_own(tmp_path: Path) -> None:
    """Whoever writes a property of an image could write an answer below a rule."""
    rules = '[[rule]]\nname = "r"\ndestinations = ["vault"]\n[rule.match.image_properties]\nos_distro = "debian"\n'
    async with explaining(tmp_path, rules) as host:
        forged = "x)\nrule 'all' applies: yes\n\non terminate: into vault"
        await host.lives("web-1", image_properties={"os_distro": forged})
        said = await host.says("web-1")
        assert "\nrule 'all' applies" not in said
        assert sum(line.startswith("on terminate") for line in said.splitlines()) == 1
