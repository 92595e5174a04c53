"""
What an image in Glance says of the sealed bundle in it, and what of that is believed: tags and properties, both ways.

Any member of the project can edit all of it; whoever decides reads the bundle's header.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from autobackup.cloud.glance import Image
from autobackup.errors import RecordDamaged
from autobackup.model import AttemptId
from autobackup.stores.interface import Stored

ATTEMPT: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TAG: Final = "autobackup"
_MARK: Final = "autobackup_attempt"  # gone or another: somebody edited the properties
_OURS: Final = "autobackup_"
_OTHERS: Final = "autobackup_property_"  # a name that is not ours could be one of Glance's own
_ESCAPED: Final = "json:"
RETIRED: Final = "autobackup:retired"


def best_of_each(images: Sequence[Image], project: str) -> list[Image]:
    """One image for each attempt, in the order given."""
    chosen: dict[AttemptId, Image] = {}
    for image in sorted(images, key=lambda one: rank(one, attempt_of(one), project)):
        chosen.setdefault(attempt_of(image), image)
    ids = {image.id for image in chosen.values()}
    return [image for image in images if image.id in ids]


def rank(image: Image, attempt: AttemptId, project: str) -> tuple[bool, bool, bool]:
    """
    Which image of several is *attempt*'s: the least. Ours before one that was shared with us, whoever tagged it how.

    Of others', the one with the id: nobody can choose that of an image that was there before. Then the oldest.
    """
    return image.owner != project, image.status != "active", image.id != attempt


def image_properties(attempt: AttemptId, properties: Mapping[str, str]) -> dict[str, str]:
    words = {key if key.startswith(_OURS) else _OTHERS + key: _encoded(value) for key, value in properties.items()}
    words |= {_MARK: attempt, "image_type": "autobackup"}
    if instance := properties.get("autobackup_instance"):
        words["instance_uuid"] = instance
    if secret := properties.get("autobackup_key_ref"):
        # the words of the image encryption spec; nothing acts on them, and the key's end is ours to bring
        words |= {
            "os_encrypt_format": "AES256-GCM-HKDF",
            "os_encrypt_key_id": secret,
            "os_encrypt_key_deletion_policy": "do_not_delete",
        }
    return words


def undescribed(image: Image, attempt: AttemptId, project: str) -> Stored:
    return Stored(
        attempt=attempt,
        size_bytes=image.size_bytes or 0,
        properties={},
        digest_algorithm=image.hash_algorithm or "",
        digest=image.hash_value or "",
        shared_by="" if image.owner == project else image.owner,
        retired=RETIRED in image.tags,
        version=image.hash_value or "",
    )


def stored_of(image: Image, project: str) -> Stored:
    attempt = attempt_of(image)
    if image.properties.get(_MARK) != attempt:
        raise RecordDamaged(f"image {image.id}: somebody edited its autobackup_* properties")
    properties = {
        key.removeprefix(_OTHERS): _decoded(value, image)
        for key, value in image.properties.items()
        if key.startswith(_OURS) and key != _MARK
    }
    return replace(undescribed(image, attempt, project), properties=properties)


def attempt_of(image: Image) -> AttemptId:
    """By its tag; by its own words or the least of them where somebody gave it several."""
    tagged = sorted(tag.removeprefix(f"{TAG}:") for tag in image.tags if tag.startswith(f"{TAG}:"))  # and our others
    known = [text for text in tagged if ATTEMPT.fullmatch(text)] or [image.id]
    own = [text for text in (image.properties.get(_MARK, ""), image.id) if text in known]
    return AttemptId((own or known)[0])


def _encoded(value: str) -> str:
    """Glance takes no character beyond the Basic Multilingual Plane: MySQL's utf8 would not hold it."""
    return _ESCAPED + json.dumps(value) if plain(value) != value or value.startswith(_ESCAPED) else value


def _decoded(value: str, image: Image) -> str:
    if not value.startswith(_ESCAPED):
        return value
    try:
        return str(json.loads(value.removeprefix(_ESCAPED)))
    except ValueError:
        raise RecordDamaged(f"image {image.id}: somebody edited its autobackup_* properties") from None


def plain(text: str) -> str:
    return re.sub("[^\x00-\ud7ff\ue000-\uffff]", "\ufffd", text)
