"""
Runs in the services' environment: `rows.py NOVA_CONF` writes servers into Nova's databases, with Nova's own objects.

One request a line on standard input, `[verb, {argument: value}]`; one answer a line on
standard output, `{"done": ...}` or `{"failed": "..."}`. It ends with its standard input.
Each verb saves what the code that it names saves, in that order, and nothing else of it:
no disk, no message, no placement.
"""

import json
import sys
import uuid as uuid_module

from nova import monkey_patch

monkey_patch.patch(backend="threading")

from nova import config, context, objects, policies, policy  # noqa: E402
from nova.db.main import api as db  # noqa: E402
from nova.network import model as network_model  # noqa: E402
from oslo_utils import timeutils  # noqa: E402
from sqlalchemy import event  # noqa: E402
from sqlalchemy.engine import Engine  # noqa: E402

ADMIN = context.get_admin_context()
NOSTATE, RUNNING, SHUTDOWN = 0, 1, 4  # nova.compute.power_state


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def immediate(connection, _cursor, statement, parameters, _context, _executemany):
    """As in `wsgi.py`."""
    if statement == "BEGIN" and connection.dialect.name == "sqlite":
        statement = "BEGIN IMMEDIATE"
    return statement, parameters


def put(*, uuid, cell, project, user, host, name, image, vm_state, task_state, metadata, extra_specs, launched):
    """A server, saved once after its creation: as long as `updated_at` is null `changes-since` never finds it."""
    mapping = next(one for one in objects.CellMappingList.get_all(ADMIN) if one.name == cell)
    objects.InstanceMapping(
        ADMIN, instance_uuid=uuid, project_id=project, user_id=user, cell_mapping=mapping, queued_for_delete=False
    ).create()
    flavor = objects.Flavor(
        **dict.fromkeys(("description", "deleted_at", "created_at", "updated_at")),
        id=1,
        flavorid="1",
        name="small",
        memory_mb=64,
        vcpus=1,
        root_gb=1,
        ephemeral_gb=0,
        swap=0,
        rxtx_factor=1.0,
        vcpu_weight=0,
        disabled=False,
        is_public=True,
        deleted=False,
        extra_specs=extra_specs,
    )
    with context.target_cell(ADMIN, mapping) as cctxt:
        instance = objects.Instance(
            cctxt,
            uuid=uuid,
            project_id=project,
            user_id=user,
            display_name=name,
            hostname=name,
            image_ref=image,
            metadata=metadata,
            system_metadata={},
            root_device_name="/dev/vda",
            flavor=flavor,
            old_flavor=None,
            new_flavor=None,
            instance_type_id=1,
            memory_mb=64,
            vcpus=1,
            root_gb=1,
            ephemeral_gb=0,
            power_state=NOSTATE,
            vm_state="building",
            task_state="scheduling",
        )
        instance.info_cache = objects.InstanceInfoCache(instance_uuid=uuid, network_info=network_model.NetworkInfo())
        instance.create()
        _place(instance, cctxt, host)
        instance.vm_state, instance.task_state = vm_state, task_state
        if launched:
            instance.launched_at = timeutils.utcnow()
            instance.power_state = RUNNING
        instance.save()


def change(*, uuid, **fields):
    """Any columns at once. A null `host` takes `node` and `compute_id` with it, a new one brings its own."""
    with _target(uuid) as cctxt:
        instance = _get(cctxt, uuid)
        if "host" in fields:
            _place(instance, cctxt, fields.pop("host"))
        for name, value in fields.items():
            setattr(instance, name, value)
        instance.save()


def mark_deleted(*, uuid):
    """ComputeManager._delete_instance as far as its save; the row is there until `destroy`."""
    with _target(uuid) as cctxt:
        instance = _get(cctxt, uuid)
        instance.vm_state, instance.task_state = "deleted", None
        instance.power_state = NOSTATE
        instance.terminated_at = timeutils.utcnow()
        instance.save()
    queue_delete(uuid=uuid)


def destroy(*, uuid):
    """Instance.destroy alone: its states stay as they were."""
    with _target(uuid) as cctxt:
        _get(cctxt, uuid).destroy()


def soft_delete(*, uuid):
    """API._do_soft_delete and ComputeManager.soft_delete_instance."""
    change(uuid=uuid, vm_state="soft-delete", task_state=None, power_state=SHUTDOWN)
    queue_delete(uuid=uuid)


def offload(*, uuid):
    """ComputeManager._shelve_offload_instance."""
    change(uuid=uuid, vm_state="shelved_offloaded", task_state=None, power_state=SHUTDOWN)
    change(uuid=uuid, host=None)


def queue_delete(*, uuid):
    """API._update_queued_for_deletion."""
    mapping = objects.InstanceMapping.get_by_instance_uuid(ADMIN, uuid)
    mapping.queued_for_delete = True
    mapping.save()


def archive():
    """`nova-manage db archive_deleted_rows --all-cells`: no API shows again what was destroyed."""
    for mapping in objects.CellMappingList.get_all(ADMIN):
        with context.target_cell(ADMIN, mapping) as cctxt:
            _counts, uuids, _total = db.archive_deleted_rows(context=cctxt, max_rows=1000)
            db.purge_shadow_tables(cctxt, None)  # SQLite gives the same ids again
        objects.InstanceMappingList.destroy_bulk(ADMIN, uuids)


def defaults():
    """Every rule's own default, by name."""
    return {rule.name: rule.check_str for rule in policies.list_rules()}


def allowed(*, roles):
    """The rules that such a token passes on a server of another project, with the policy file as it is now."""
    token = context.RequestContext(user_id="u", project_id="p", roles=roles, is_admin=False)
    policy.init()
    target = {"project_id": "another", "user_id": "another"}
    return sorted(name for name in defaults() if policy.authorize(token, name, target, do_raise=False))


def main():
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = {"done": globals()[verb](**arguments)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _target(uuid):
    return context.target_cell(ADMIN, objects.InstanceMapping.get_by_instance_uuid(ADMIN, uuid).cell_mapping)


def _get(cctxt, uuid):
    return objects.Instance.get_by_uuid(
        cctxt, uuid, expected_attrs=["metadata", "system_metadata", "info_cache", "flavor"]
    )


def _place(instance, cctxt, host):
    instance.host = instance.node = host
    instance.compute_id = None if host is None else _compute_id(cctxt, host)


def _compute_id(cctxt, host):
    """The host's compute node, made with its service when it is first named."""
    nodes = objects.ComputeNodeList.get_all(cctxt)
    if known := [node.id for node in nodes if node.host == host]:
        return known[0]
    service = objects.Service(
        cctxt, host=host, binary="nova-compute", topic="compute", report_count=1, last_seen_up=timeutils.utcnow()
    )
    service.create()
    node = objects.ComputeNode(
        cctxt,
        uuid=str(uuid_module.uuid4()),
        host=host,
        hypervisor_hostname=host,
        service_id=service.id,
        hypervisor_type="QEMU",
        hypervisor_version=1,
        cpu_info="{}",
        vcpus=4,
        vcpus_used=0,
        memory_mb=4096,
        memory_mb_used=0,
        free_ram_mb=4096,
        local_gb=100,
        local_gb_used=0,
        free_disk_gb=100,
        current_workload=0,
        running_vms=0,
    )
    node.create()
    return node.id


config.parse_args(["rows"], default_config_files=[sys.argv[1]])
objects.register_all()
main()
