"""Where sealed bundles and keys go: one interface (`interface`), one module for each kind of store or key."""

from autobackup.stores.interface import BASE, KIND, KIND_BASE, PARENTS, Begun, Body, Chunk, Store, Stored
from autobackup.stores.keys import DataKey, KeyOpener, Keyring, KeySource
from autobackup.stores.opening import OpenDestination, open_destination

__all__ = [
    "BASE",
    "KIND",
    "KIND_BASE",
    "PARENTS",
    "Begun",
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
