"""
What a value of the configuration may be: with a unit, an absolute path, an id. And how a wrong one is spoken of.

Which keys there are is `config`'s and `terms`' to say.
"""

import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, ConfigDict

from autobackup.units import parse_bytes, parse_duration_s

_DESTINATION_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what the header of a bundle can hold
_SOCKET_PATH_BYTES: Final = 107  # sun_path of unix(7), less its NUL
_PROJECT_ID: Final = re.compile(r"[0-9a-f]{32}")
_USER_ID: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # Keystone's own users; those of LDAP and federation


def _with_unit(parse: Any) -> BeforeValidator:
    def convert(value: object) -> object:
        if isinstance(value, str):
            return parse(value)
        raise ValueError(f'write it in quotes with its unit, as in "{"30s" if parse is parse_duration_s else "64MiB"}"')

    return BeforeValidator(convert)


def _between(least: str, most: str, *, parse: Callable[[str], float] = parse_duration_s) -> AfterValidator:
    """What makes sense in a file. Code that builds a section by itself is not held to it."""

    def check(value: float) -> float:
        if not parse(least) <= value <= parse(most):
            raise ValueError(f"must be {least} to {most}")
        return value

    return AfterValidator(check)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} must be an absolute path: what it is relative to differs from start to start")
    return path


def _socket_path(path: Path) -> Path:
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ValueError(f"a socket's path has at most {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    return path


def _destination_name(name: str) -> str:
    if _DESTINATION_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} must be 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit"
        )
    return name


def _project_id(project: str) -> str:
    if _PROJECT_ID.fullmatch(project) is None:
        raise ValueError(
            f"{project!r} is not the id of a project, and Glance would take it unseen; "
            f"ask for the id with: openstack project show -f value -c id {project}"
        )
    return project


def _user_id(user: str) -> str:
    if _USER_ID.fullmatch(user) is None:
        raise ValueError(
            f"{user!r} is not the id of a user, and Barbican would take it unseen; "
            f"ask for the id with: openstack user show -f value -c id {user}"
        )
    return user


Seconds = Annotated[float, _with_unit(parse_duration_s)]
ByteCount = Annotated[int, _with_unit(parse_bytes)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Pause = Annotated[Seconds, _between("100ms", "1d")]  # 0 would be a busy loop
Deadline = Annotated[Seconds, _between("1s", "10m")]  # libvirt's keepalive counts whole seconds
Interval = Annotated[Seconds, _between("1s", "1d")]
LongInterval = Annotated[Seconds, _between("1s", "30d")]
Retention = Annotated[Seconds, _between("1s", "36525d")]
Name = Annotated[str, AfterValidator(_destination_name)]
SocketPath = Annotated[AbsolutePath, AfterValidator(_socket_path)]
Rate = Annotated[ByteCount, _between("64KiB", "1TiB", parse=parse_bytes)]  # bytes each second
ProjectId = Annotated[str, AfterValidator(_project_id)]
UserId = Annotated[str, AfterValidator(_user_id)]
SpoolReserve = Annotated[ByteCount, _between("1MiB", "1GiB", parse=parse_bytes)]


class WrongAt(ValueError):
    """What only a look at several keys can tell; *at* is the key to mend, below the table that is looked at."""

    def __init__(self, words: str, *, at: tuple[str | int, ...]) -> None:
        super().__init__(words)
        self.at = at


def key_of(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s")


def nearest(word: str, known: Sequence[str], *, none: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}" if known else none


SECTION: Final = ConfigDict(extra="forbid", alias_generator=key_of)
