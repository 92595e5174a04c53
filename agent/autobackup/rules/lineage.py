"""
Lineage: what the name of a backing file tells of its origin, how a backup keeps what it stands on, who stands on what.

Nova names a base after the image that it was made from: `<instances>/_base/<sha1 of the image's id>`. `nova:root` in
the domain is a hint only: after an unshelve it names an image that is gone, while the disk stands on the first one's.
Names with something behind the digest (`_sm`, `_<GB>`: resized by old releases) have that image, too, but not its
bytes; ephemeral and swap bases have none. That an image really yields the bytes of a base is for the content to say.

This module compares facts; it reads no image and asks no cloud.
"""

import enum
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from autobackup.model import Anchor, Protection

MOST_PARENTS: Final = 14  # a header's `parent` has room for 16 words

_IMAGE: Final = re.compile(r"([0-9a-f]{40})(_.+)?")
_EPHEMERAL: Final = re.compile(r"ephemeral_[0-9]+_[0-9a-f]+|eph(emeral)?_.+")
_SWAP: Final = re.compile(r"swap_[0-9]+")
_HINT: Final = "base_"
_SEALED: Final = "sealed:"
_IN_GLANCE: Final = "image:"


class Origin(enum.StrEnum):
    """What a backing file was made from, by its name."""

    IMAGE = "image"
    RESIZED = "resized"  # an image, grown or shrunk by Nova: its bytes are others
    EPHEMERAL = "ephemeral"
    SWAP = "swap"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseName:
    """*image_sha1* is empty where the name tells of no image."""

    origin: Origin
    image_sha1: str = ""


def read_name(path: str) -> BaseName:
    """What the file name of *path* tells."""
    name = path.rpartition("/")[2]
    if found := _IMAGE.fullmatch(name):
        return BaseName(origin=Origin.RESIZED if found[2] else Origin.IMAGE, image_sha1=found[1])
    if _EPHEMERAL.fullmatch(name):
        return BaseName(origin=Origin.EPHEMERAL)
    return BaseName(origin=Origin.SWAP if _SWAP.fullmatch(name) else Origin.UNKNOWN)


def image_of(path: str, candidates: Iterable[str]) -> str | None:
    """Which of these ids of images the backing file *path* is named after."""
    sha1 = read_name(path).image_sha1
    return next((one for one in candidates if sha1 and base_name(one) == sha1), None)


def base_name(image: str) -> str:
    """The name of the file that Nova makes of *image* (nova/virt/libvirt/imagecache.py)."""
    return hashlib.sha1(image.encode()).hexdigest()  # noqa: S324


# ---- how a parent is kept ------------------------------------------------------------------------------------


class Way(enum.StrEnum):
    """How one backing file is kept for one copy."""

    PROTECT = "protect"
    COPY = "copy"
    REFUSE = "refuse"  # the terms cannot be met: an operator must look
    NONE = "none"  # there is neither a file nor an image any more


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """
    The image that a base was made from, as the destination's project sees it.

    *yields*: whether its data was found to be the base's bytes; None where there is no base left to compare it with.
    """

    is_active: bool
    is_visible_to_all: bool  # to everybody whom the backup is for
    is_ours_to_protect: bool
    yields: bool | None


def way(
    terms: Literal["auto", "protect", "copy"], origin: Origin, image: ImageFacts | None, *, is_readable: bool
) -> tuple[Way, str]:
    """
    How to keep a base, and why not otherwise. *image*: None if it is not to be found.

    A base that was never an image's (ephemeral, swap) is copied whatever the terms: there is nothing to protect.
    """
    obstacle = _obstacle(image, is_readable=is_readable)
    if is_readable and terms == "copy":
        return Way.COPY, "the terms say so"
    if not obstacle:
        return Way.PROTECT, ""
    if not is_readable:
        return Way.NONE, f"the file is gone, and {obstacle}"
    if terms == "protect" and origin in (Origin.IMAGE, Origin.RESIZED):
        return Way.REFUSE, obstacle
    return Way.COPY, obstacle


def _obstacle(image: ImageFacts | None, *, is_readable: bool) -> str:
    if image is None:
        return "its image is not to be found in Glance"
    if not image.is_active:
        return "its image is not active"
    if image.yields is False:
        return "its image holds other bytes than the base"
    if image.yields is None and is_readable:
        return "its image was not compared with the base"
    if not image.is_visible_to_all:
        return "not everybody whom the backup is for can read its image"
    if not image.is_ours_to_protect:
        return "its image is not ours to protect"
    return ""


# ---- who stands on what --------------------------------------------------------------------------------------


def header_words(paths: Sequence[str], image: str, anchors: Sequence[Anchor]) -> Mapping[str, str] | None:
    """
    `parent` of a sealed bundle's header: the *image* that the first parent was made from, and where each is kept.

    *paths* are the parents', in the manifest's order.
    """
    words = {"image": image} if image else {}
    numbers = {path: n for n, path in enumerate(paths)}
    for anchor in anchors:
        kind = _SEALED if anchor.protection is Protection.COPY else _IN_GLANCE
        words[f"{_HINT}{numbers[anchor.path]}"] = kind + anchor.parent
    return words or None


def sealed_hint(words: Mapping[str, str] | None, number: int) -> str | None:
    """The attempt that a header names for parent *number*, if it is a sealed base."""
    hint = (words or {}).get(f"{_HINT}{number}", "")
    return hint.removeprefix(_SEALED) if hint.startswith(_SEALED) else None


def stood_on(words: Mapping[str, str] | None) -> frozenset[str]:
    """The ids of all that a header says its bundle stands on: images that were protected for it, sealed bases."""
    hints = (value for name, value in (words or {}).items() if name.startswith(_HINT))
    return frozenset(value.removeprefix(_SEALED).removeprefix(_IN_GLANCE) for value in hints)
