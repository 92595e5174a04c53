"""Where sealed bundles and keys go: one interface (`interface`), one module for each kind of store or key."""

from autobackup.config import Destination
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.interface import Body, Chunk, Store, Stored
from autobackup.stores.keys import DataKey, KeyFile, KeySource

__all__ = ["Body", "Chunk", "DataKey", "KeySource", "Store", "Stored", "open_keys", "open_store"]


def open_store(destination: Destination) -> Store:
    """The store of one destination. Opens nothing on the outside yet."""
    return DirectoryStore(
        str(destination.path), reserve_bytes=destination.reserve_bytes, must_be_mount=destination.must_be_mount
    )


def open_keys(destination: Destination) -> KeySource:
    """The key source of one destination."""
    return KeyFile(str(destination.keyfile), older=[str(path) for path in destination.older_keyfiles])
