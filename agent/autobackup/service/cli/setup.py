"""`check-config`, `keygen`, `doctor`: before the first start, and when something is not well."""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from autobackup.cloud.nova import Nova
from autobackup.config import DEFAULT_PATH, Config
from autobackup.configfile import load
from autobackup.errors import Transient
from autobackup.flows.examine import Finding, examine, examine_nova
from autobackup.flows.places import Places
from autobackup.service.app import check
from autobackup.service.cli.output import format_option, show_one, show_rows
from autobackup.service.witness import nova_host, nova_session
from autobackup.stores import open_destination
from autobackup.stores.keyfile import write_kek
from autobackup.stores.recipient import write_key_pair
from autobackup.terms import Destination


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_PATH)
@format_option
def check_config(file: Path, fmt: str) -> None:
    """Read FILE and its conf.d as the agent would; say what is wrong, and what the rules amount to."""
    config = load(file)
    places = Places(config.destination, functools.partial(open_destination, openstack=config.openstack))
    asyncio.run(check(config, places))
    show_one(
        {
            "file": str(file),
            "instances_path": str(config.instances_path),
            "destinations": ", ".join(d.name for d in config.destination) or "none",
            "rules": ", ".join(rule.name for rule in config.rule) or "none: nothing will be captured",
            "result": "ok" if config.instances_path.is_dir() else "ok, but instances_path is not a folder here",
        },
        fmt=fmt,
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipient", is_flag=True, help="A key pair instead: FILE opens, FILE.pub is for `recipients`.")
@click.option(
    "--post-quantum", is_flag=True, help="With --recipient: ML-KEM-768 and X25519 together, not X25519 alone."
)
@format_option
def keygen(file: Path, fmt: str, *, recipient: bool, post_quantum: bool) -> None:
    """
    Make a key file: a fresh key-encryption key, mode 0600. An existing file is never overwritten.

    Keep a copy off this host. Without it nothing that was sealed under it can ever be opened. Of a pair, the host needs
    FILE.pub alone: keep FILE where disks are restored, and nowhere near the host.
    """
    if post_quantum and not recipient:
        raise click.UsageError("--post-quantum goes with --recipient")
    if recipient:
        key_id = write_key_pair(str(file), post_quantum=post_quantum)
        show_one({"file": str(file), "public": f"{file}.pub", "recipient_id": key_id}, fmt=fmt)
    else:
        show_one({"file": str(file), "kek_id": write_kek(str(file))}, fmt=fmt)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_PATH)
@format_option
def doctor(file: Path, fmt: str) -> None:
    """
    Ask every destination of FILE whether it would take a backup now: reachable, which role is missing, what is weak;
    and Nova whether it would say what became of a server.

    Draws a key where keys come from, gets it again, and destroys it. Exit status 5 if one would not.
    """
    config = load(file)
    asked = [one for one in config.destination if one.name != config.only_asked_for]
    findings = asyncio.run(_examine(config, asked))
    columns = ("destination", "where", "result", "remedy")
    show_rows([asdict(one) for one in findings], columns=columns, fmt=fmt, empty="No destination is configured.")
    if any(one.result == "unusable" for one in findings):
        raise Transient("not everything that a backup needs would work now")


async def _examine(config: Config, asked: Sequence[Destination]) -> list[Finding]:
    findings = await examine([open_destination(one, config.openstack) for one in asked])
    session = nova_session(config)
    if session is not None:
        findings.append(await examine_nova(Nova(session, host=nova_host(config))))
    return findings


COMMANDS = (check_config, keygen, doctor)
