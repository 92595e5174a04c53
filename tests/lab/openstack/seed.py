"""
The databases of an empty cloud, migrated and provisioned once: half a minute of every start otherwise.

They lie in `build/openstack/seed/<key>`; the key is a hash of everything that decides what
is in them. A seed appears by a rename, whole; under a lock, so that of two test runs one
makes it and the other waits. It holds no password and no key. `python -m
tests.lab.openstack.seed` makes it if it is not there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.lab.openstack.config import APPS, Site
from tests.lab.openstack.identity import ADMIN, REGION, Ids, provision
from tests.lab.openstack.services import BUILD, CloudError, Listener, Service, missing_services, run_tool, venv

_SEEDS: Final = BUILD / "seed"
_IDS: Final = "ids.json"


def plant(site: Site) -> Ids:
    """Copy the seed's databases to *site*; make the seed first where it is missing."""
    with _locked():
        seed = _seed()
        for app in APPS:
            shutil.copyfile(seed / f"{app}.db", site.database(app))
        return Ids(**json.loads((seed / _IDS).read_text()))


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
    """Return the seed's folder. Whatever else is there is of other versions, or was left by a kill."""
    seed = _SEEDS / _key()
    if seed.exists():
        return seed
    for old in _SEEDS.glob("[!.]*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix="making-", dir=_SEEDS) as making:
        folder = Path(making) / "cloud"
        folder.mkdir()
        ids = _grow(folder)
        ready = Path(making) / "ready"
        ready.mkdir()
        for app in APPS:
            if (journal := folder / app / f"{app}.db-journal").exists():
                raise CloudError(f"{journal} is left: the database is not at rest")
            (folder / app / f"{app}.db").rename(ready / f"{app}.db")
        (ready / _IDS).write_text(json.dumps(asdict(ids)))
        ready.rename(seed)
    return seed


def _key() -> str:
    digest = hashlib.sha256(sys.version.encode())
    digest.update(str(venv()).encode())
    for path in sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.txt")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _grow(folder: Path) -> Ids:
    listener = Listener()
    site = Site(folder=folder, keystone_url=listener.url, service_passwords={"glance": "-", "barbican": "-"})
    site.make_folders()
    site.make_keys()
    keystone, _, glance = site.keystone(url=listener.url), site.barbican(), site.glance()
    admin_password = secrets.token_urlsafe(18)

    def fill_keystone() -> Ids:
        with_config = ("--config-file", str(keystone))
        log = site.logs / "keystone-manage.log"
        run_tool("keystone-manage", *with_config, "db_sync", log=log)
        # Without a URL it makes no endpoint and no service.
        arguments = ["--bootstrap-password", admin_password, "--bootstrap-region-id", REGION]
        run_tool("keystone-manage", *with_config, "bootstrap", *arguments, log=log)
        service = Service("keystone", program=site.keystone_program(keystone), listener=listener, logs=site.logs)
        try:
            service.wait_until_ready("/v3")
            return provision(listener.url, admin_password=admin_password)
        finally:
            service.stop()

    def fill_others() -> None:
        run_tool("barbican-manage", "db", "upgrade", log=site.logs / "barbican-manage.log", **site.barbican_home)
        run_tool("glance-manage", "--config-file", str(glance), "db_sync", log=site.logs / "glance-manage.log")

    with contextlib.closing(listener.socket), ThreadPoolExecutor() as pool:
        others = pool.submit(fill_others)
        ids = pool.submit(fill_keystone).result()
        others.result()
    assert ADMIN in ids.users
    return ids


if __name__ == "__main__":
    if missing := missing_services():
        sys.exit(missing)
    with _locked():
        _seed()
