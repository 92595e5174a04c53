"""
Runs in the services' environment: `migrate.py NOVA_CONF CELL...` makes an empty Nova's databases.

What `nova-manage api_db sync`, `db sync`, `cell_v2 map_cell0` and `create_cell` do, without
importing Nova four times. All cells are made alike, so further ones are copies of cell0.
"""

import shutil
import sys
from pathlib import Path

from nova import monkey_patch

monkey_patch.patch(backend="threading")

from nova import config, context, objects  # noqa: E402
from nova.conf import CONF  # noqa: E402
from nova.db import migration  # noqa: E402
from oslo_utils import uuidutils  # noqa: E402


def main() -> None:
    config.parse_args(["migrate"], default_config_files=[sys.argv[1]])
    objects.register_all()
    migration.db_sync(database="api")
    migration.db_sync(database="main")
    cell0 = CONF.database.connection
    _map("cell0", uuid=objects.CellMapping.CELL0_UUID, transport_url="none:///", database=cell0)
    for name in sys.argv[2:]:
        url = cell0.replace("cell0.db", f"{name}.db")
        shutil.copyfile(_path(cell0), _path(url))
        _map(name, uuid=uuidutils.generate_uuid(), transport_url="fake://", database=url)


def _map(name: str, *, uuid: str, transport_url: str, database: str) -> None:
    admin = context.get_admin_context()
    objects.CellMapping(admin, uuid=uuid, name=name, transport_url=transport_url, database_connection=database).create()


def _path(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///").partition("?")[0])


main()
