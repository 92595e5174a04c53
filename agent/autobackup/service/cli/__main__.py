"""`python -m autobackup.service.cli` is `autobackup`."""

from autobackup.service.cli import main

main(prog_name="autobackup")
