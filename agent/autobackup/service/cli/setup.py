"""`check-config` and `keygen`: before the first start."""

import asyncio
from pathlib import Path

import click

from autobackup.config import DEFAULT_PATH, load
from autobackup.service.app import check
from autobackup.service.cli.output import format_option, show_one
from autobackup.stores.keys import write_kek


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_PATH)
@format_option
def check_config(file: Path, fmt: str) -> None:
    """Read FILE and its conf.d as the agent would; say what is wrong, and what the rules amount to."""
    config = load(file)
    asyncio.run(check(config))
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
@format_option
def keygen(file: Path, fmt: str) -> None:
    """
    Make a key file: a fresh key-encryption key, mode 0600. An existing file is never overwritten.

    Keep a copy off this host. Without it nothing that was sealed under it can ever be opened.
    """
    show_one({"file": str(file), "kek_id": write_kek(str(file))}, fmt=fmt)


COMMANDS = (check_config, keygen)
