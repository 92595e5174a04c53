"""
A destination as the configuration has it becomes a store and its keys. Opens nothing on the outside yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autobackup.cloud.parents import Parents
from autobackup.cloud.session import ProjectSession
from autobackup.config import OpenstackSection
from autobackup.stores.barbican import BarbicanKeys
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.glance import GlanceStore
from autobackup.stores.interface import Store
from autobackup.stores.keyfile import KeyFile
from autobackup.stores.keys import KeyOpener, Keyring, KeySource, PublishedKey
from autobackup.stores.recipient import PrivateKeys, Recipients, is_private_key
from autobackup.terms import Destination


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDestination:
    """One destination, ready to be used. *session* is there where it is a project of a cloud."""

    destination: Destination
    store: Store
    keys: KeySource
    session: ProjectSession | None = None
    parents: Parents | None = None  # the images that backups there may stand on
    clouds_yaml: Path | None = None


def open_destination(
    destination: Destination, openstack: OpenstackSection, *, private_keys: Sequence[str] = ()
) -> OpenDestination:
    """
    The store and the keys of *destination*.

    *private_keys* are files of whoever restores: a host that writes has none. Its `keyfile` may be such a file, too.
    """
    session = _session(destination, openstack) if destination.cloud else None
    store: Store
    if destination.store == "glance":
        assert session is not None
        store = GlanceStore(
            session,
            members=destination.members,
            stall_timeout_s=openstack.stall_timeout_s,
            reply_timeout_s=openstack.reply_timeout_s,
        )
    else:
        store = DirectoryStore(
            str(destination.path), reserve_bytes=destination.reserve_bytes, must_be_mount=destination.must_be_mount
        )
    keys = _keyring(destination, session, private_keys)
    parents = None
    if session is not None and destination.store == "glance":
        parents = Parents(
            session, session_of=lambda project: _session(replace(destination, project=project), openstack)
        )
    return OpenDestination(
        destination=destination, store=store, keys=keys, session=session, parents=parents,
        clouds_yaml=openstack.clouds_yaml,
    )  # fmt: skip


def _keyring(destination: Destination, session: ProjectSession | None, private_keys: Sequence[str]) -> Keyring:
    sources: dict[str, KeySource] = {"none": PublishedKey()}
    if destination.recipients:
        sources["recipient"] = Recipients([str(path) for path in destination.recipients])
    if session is not None:
        sources["barbican"] = BarbicanKeys(
            session, readers=destination.readers, project_access=destination.project_access
        )
    files = [str(path) for path in (destination.keyfile, *destination.older_keyfiles) if path is not None]
    if files:
        sources["keyfile"] = KeyFile(files[0], older=files[1:])
    openers: dict[str, KeyOpener] = dict(sources)
    if private_keys:
        openers["recipient"] = PrivateKeys(private_keys)
    return Keyring(sources[destination.key], openers)


def _session(destination: Destination, openstack: OpenstackSection) -> ProjectSession:
    return ProjectSession(
        cloud=destination.cloud,
        project=destination.project,
        project_domain=destination.project_domain,
        clouds_yaml=openstack.clouds_yaml,
        call_timeout_s=openstack.call_timeout_s,
    )


__all__ = ["OpenDestination", "is_private_key", "open_destination"]
