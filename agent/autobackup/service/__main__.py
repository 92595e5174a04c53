"""`python -m autobackup.service` is `autobackup-agent`."""

from autobackup.service.app import main

main()
