"""What the tests of the configuration share: /etc/autobackup for a test, and the smallest tables that load."""

from pathlib import Path

import pytest

from autobackup.config import Config
from autobackup.configfile import load
from autobackup.errors import ConfigError

DESTINATION = """
[[destination]]
name = "vault"
store = "directory"
path = "/srv/vault"
key = "keyfile"
keyfile = "/etc/autobackup/kek"
"""
RULE = """
[[rule]]
name = "everything"
destinations = ["vault"]
"""


class Folder:
    """/etc/autobackup, for a test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.main = path / "autobackup.toml"
        self.conf_d = path / "conf.d"

    def write(self, main: str, **drop_ins: str) -> Path:
        self.main.write_text(main)
        if drop_ins:
            self.conf_d.mkdir(exist_ok=True)
        for name, text in drop_ins.items():
            self.drop_in(name).write_text(text)
        return self.main

    def drop_in(self, name: str) -> Path:
        return self.conf_d / f"{name}.toml"

    def read(self, main: str, **drop_ins: str) -> Config:
        return load(self.write(main, **drop_ins))

    def refuse(self, main: str, **drop_ins: str) -> list[str]:
        """The lines of the refusal."""
        with pytest.raises(ConfigError) as caught:
            self.read(main, **drop_ins)
        return str(caught.value).splitlines()

    def refuse_once(self, main: str, **drop_ins: str) -> str:
        (line,) = self.refuse(main, **drop_ins)
        return line
