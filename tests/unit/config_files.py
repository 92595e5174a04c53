"""What the tests of the configuration share: /etc/autobackup for a test, and the smallest tables that load."""

import dataclasses
import re
from pathlib import Path
from typing import Final

import pytest

from autobackup.config import (
    ApiSection,
    CaptureSection,
    Config,
    LibvirtSection,
    NovaSection,
    OpenstackSection,
    RetrySection,
    SealingSection,
)
from autobackup.configfile import load
from autobackup.container.header import Header
from autobackup.errors import ConfigError
from autobackup.terms import Destination, Match, RequestSection, Rule

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
SECTIONS: Final[dict[type, str]] = {
    Config: "",
    NovaSection: "nova",
    LibvirtSection: "libvirt",
    CaptureSection: "capture",
    SealingSection: "sealing",
    RetrySection: "retry",
    OpenstackSection: "openstack",
    RequestSection: "request",
    ApiSection: "api",
    Destination: "destination[1]",
    Rule: "rule[1]",
    Match: "rule[1].match",
}
"""Every table of the configuration: its class, and the words for it."""
HEADS: Final = {
    **{words: f"[{words}]\n" if words else "" for words in SECTIONS.values()},
    "destination[1]": DESTINATION,
    "rule[1]": DESTINATION + RULE,
    "rule[1].match": DESTINATION + RULE + "[rule.match]\n",
}


def keys_of(section: type) -> list[str]:
    """As an operator writes them: the value carries the unit."""
    names = [field.name for field in dataclasses.fields(section)]
    return [re.sub(r"_(bytes|s)$", "", name) for name in names]


ALL_KEYS: Final = [(where, key) for section, where in SECTIONS.items() for key in keys_of(section)]


def dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def header(*, destination: str = "vault", expires_at_s: int | None = None) -> Header:
    """What a bundle's header can hold: it refuses the rest with `ValueError`."""
    return Header(
        job="job", attempt="attempt", instance="6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e", destination=destination,
        created_at_s=0, expires_at_s=expires_at_s,
        key={"source": "keyfile", "kek_id": "0" * 16, "wrapped": "A" * 53 + "A=="}, parent=None,
    )  # fmt: skip


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
