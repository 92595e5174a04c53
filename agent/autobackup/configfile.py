"""
Reads the configuration: TOML files, refused whole if a word of them is wrong.

`autobackup.toml` is read first, then the `*.toml` of the `conf.d` folder beside it in the order of their names:
tables merge key by key, scalars of a later file win, `[[destination]]` and `[[rule]]` add up. Every error names
the file, the key and what to write instead.

What the keys mean, and what they may be, is `config`'s to say.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from autobackup.config import Config
from autobackup.errors import ConfigError
from autobackup.fields import key_of, nearest

_REMEDIES: Final = {
    "dataclass_type": "must be a table: write [{key}] above its keys",
    "tuple_type": "must be a list",
}


def load(path: Path) -> Config:
    """Read *path* and its `conf.d`. Raises `ConfigError` with every mistake found, one a line."""
    merged: dict[str, Any] = {}
    origin: dict[tuple[str | int, ...], Path] = {}
    for file in [path, *_drop_ins(path.parent / "conf.d")]:
        _merge(merged, _parse(file), file=file, origin=origin, at=())
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as exc:
        lines = [_explain(error, origin, path) for error in exc.errors()]
        raise ConfigError("\n".join(lines)) from None


def _drop_ins(folder: Path) -> list[Path]:
    """Listed, not globbed: a glob calls a folder that cannot be read empty."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix == ".toml" and not file.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise ConfigError(f"{folder}: {exc.strerror}") from None


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        remedy = "the link leads nowhere; remove it" if file.is_symlink() else "name the file with --config"
        raise ConfigError(f"{file}: not found; {remedy}") from None
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file}: not valid TOML: {exc}") from None
    except RecursionError:
        raise ConfigError(f"{file}: not valid TOML: it is nested too deeply") from None


def _merge(
    into: dict[str, Any],
    new: Mapping[str, Any],
    *,
    file: Path,
    origin: dict[tuple[str | int, ...], Path],
    at: tuple[str | int, ...],
) -> None:
    for key, value in new.items():
        here = (*at, key)
        if key in into and _kind(value) != _kind(into[key]):
            words = f"is {_kind(value)}, but {_kind(into[key])} in {origin[here]}; write it the same way in both"
            raise ConfigError(f"{file}: '{'.'.join(str(part) for part in here)}' {words}")
        origin.setdefault(here, file)
        if isinstance(value, dict) and key in into:
            _merge(into[key], value, file=file, origin=origin, at=here)
        elif isinstance(value, list) and key in into and all(isinstance(v, dict) for v in [*into[key], *value]):
            origin.update({(*here, len(into[key]) + n): file for n in range(len(value))})
            into[key] = [*into[key], *value]
        else:
            origin[here] = file
            if isinstance(value, list):
                origin.update({(*here, n): file for n in range(len(value))})
            into[key] = dict(value) if isinstance(value, dict) else value
            if isinstance(value, dict):
                origin.update({(*here, sub): file for sub in value})


def _kind(value: object) -> str:
    return "a [table]" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a value"


def _explain(error: ErrorDetails, origin: Mapping[tuple[str | int, ...], Path], main: Path) -> str:
    loc = (*error["loc"], *getattr(error.get("ctx", {}).get("error"), "at", ()))
    file = next((origin[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origin), main)
    key = _words(loc, file, origin)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{file}: unknown key '{key}'; {nearest(str(loc[-1]), sorted(_keys_at(loc[:-1])))}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{file}: '{key}' is missing; add it"
    remedy = _REMEDIES.get(error["type"])
    message = remedy.format(key=key) if remedy else error["msg"].removeprefix("Value error, ")
    return f"{file}: {key}: {message}"


def _words(loc: tuple[str | int, ...], file: Path, origin: Mapping[tuple[str | int, ...], Path]) -> str:
    """The key as its file has it: entries of `[[rule]]` are counted from 1 in each file."""
    words = ""
    for at, part in enumerate(loc):
        if isinstance(part, int):
            nth = sum(origin.get((*loc[:at], n)) == file for n in range(part + 1)) or part + 1
            words += f"[{nth}]"
        else:
            words += f".{part}"
    return words.removeprefix(".")


def _keys_at(loc: tuple[str | int, ...]) -> Iterator[str]:
    """The keys that the table at *loc* may have."""
    kind: Any = Config
    for part in loc:
        if isinstance(part, int):
            kind = get_args(kind)[0]
        else:
            kind = next((hint for name, hint in get_type_hints(kind).items() if key_of(name) == part), None)
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
    if is_dataclass(kind):
        yield from (key_of(f.name) for f in fields(kind))
