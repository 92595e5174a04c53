"""Where sealed bundles and keys go: one interface (`interface`), one module for each kind of store or key."""

from autobackup.stores.interface import Body, Chunk, Store, Stored
from autobackup.stores.keys import DataKey, KeyOpener, Keyring, KeySource
from autobackup.stores.opening import OpenDestination, open_destination

__all__ = [
    "Body",
    "Chunk",
    "DataKey",
    "KeyOpener",
    "KeySource",
    "Keyring",
    "OpenDestination",
    "Store",
    "Stored",
    "open_destination",
]
