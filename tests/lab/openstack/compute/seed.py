"""
The databases of an empty Nova, migrated once: seconds of every start otherwise.

As `tests/lab/openstack/seed.py` does it for the other services, in `build/openstack/`
beside theirs, which removes what it does not know in its own folder. The cells' mappings
name their databases by path, so each copy is told its own.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab.openstack.compute.config import CELLS, DATABASES, NovaSite
from tests.lab.openstack.config import Site, database_url
from tests.lab.openstack.services import BUILD, CloudError, environment, tail, venv

_SEEDS: Final = BUILD / "nova-seed"
_HERE: Final = Path(__file__).parent


def plant(nova: NovaSite) -> None:
    """Copy the seed's databases to *nova*; make the seed first where it is missing."""
    with _locked():
        seed = _seed()
        for name in DATABASES:
            shutil.copyfile(seed / f"{name}.db", nova.database(name))
    with contextlib.closing(sqlite3.connect(nova.database("api"))) as connection, connection:
        for name in ("cell0", *CELLS):
            url = database_url(nova.database(name))
            connection.execute("UPDATE cell_mappings SET database_connection = ? WHERE name = ?", (url, name))


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    _SEEDS.mkdir(parents=True, exist_ok=True)
    lock = os.open(_SEEDS / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _seed() -> Path:
    seed = _SEEDS / _key()
    if seed.exists():
        return seed
    for old in _SEEDS.glob("[!.]*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix="making-", dir=_SEEDS) as making:
        site = Site(folder=Path(making), keystone_url="", service_passwords={"nova": "-"})
        site.logs.mkdir()
        nova = NovaSite(folder=Path(making) / "nova")
        nova.make()
        nova.configure(site)
        _migrate(nova, log=site.logs / "migrate.log")
        ready = Path(making) / "ready"
        ready.mkdir()
        for name in DATABASES:
            if (journal := nova.folder / f"{name}.db-journal").exists():
                raise CloudError(f"{journal} is left: the database is not at rest")
            nova.database(name).rename(ready / f"{name}.db")
        ready.rename(seed)
    return seed


def _migrate(nova: NovaSite, *, log: Path) -> None:
    command = [str(venv() / "bin/python"), "-I", str(_HERE / "migrate.py"), str(nova.config), *CELLS]
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), check=False
        )
    if done.returncode:
        raise CloudError(f"migrate.py: exit status {done.returncode}\n{tail(log)}")


def _key() -> str:
    digest = hashlib.sha256(sys.version.encode())
    digest.update(str(venv()).encode())
    for path in (_HERE / "config.py", _HERE / "seed.py", _HERE / "migrate.py", _HERE.parent / "constraints.txt"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
