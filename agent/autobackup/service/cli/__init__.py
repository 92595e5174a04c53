"""
`autobackup`: what an operator, an analyst or a script asks of the agent and of the stores.

Exit status, for scripts: 0 done; 1 a bug; 2 wrong usage or configuration; 3 refused (it exists, it is not there, it
is not your key); 4 damaged (the bytes are not what was sealed); 5 not available now (try again).
"""

import logging

import click

from autobackup import logs
from autobackup.service.cli import backups, explain, links, queue, restoring, setup
from autobackup.service.cli.output import ErrorsToExitCodes
from autobackup.service.heap import keep_buffers


@click.group(cls=ErrorsToExitCodes, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.version_option(package_name="autobackup")
def main() -> None:
    logs.configure(level=logging.WARNING)
    keep_buffers()


for command in (
    *backups.COMMANDS, *restoring.COMMANDS, *links.COMMANDS, *queue.COMMANDS, *explain.COMMANDS, *setup.COMMANDS
):  # fmt: skip
    main.add_command(command)
