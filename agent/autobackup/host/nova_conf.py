"""
What Nova on this host calls the host: `[DEFAULT] host` of its configuration, or else the machine's name, as Nova does.
"""

import configparser
import socket
from pathlib import Path

from autobackup.errors import ConfigError


def nova_host_name(nova_conf: Path) -> str:
    """Raises `ConfigError` if the file is there and cannot be read."""
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=", ":"), allow_no_value=True, default_section="_none_"
    )  # oslo.config lets options come again and values be anything
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # and tells Host from host
    try:
        parser.read_string(nova_conf.read_text("utf-8", "replace"), source=str(nova_conf))
    except FileNotFoundError:
        return socket.gethostname()
    except OSError as exc:
        raise ConfigError(f"nova_conf: {nova_conf}: {exc.strerror}; or write nova.host") from exc
    except configparser.Error as exc:
        words = str(exc).splitlines()[0]
        raise ConfigError(f"nova_conf: {nova_conf}: {words}; write nova.host instead") from None
    name = (parser.get("DEFAULT", "host", fallback="") or "").strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    if "$" in name or "\n" in name:
        raise ConfigError(f"nova_conf: {nova_conf}: [DEFAULT] host = {name!r} is for Nova to work out; write nova.host")
    return name or socket.gethostname()
