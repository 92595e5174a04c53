"""
What Glance's refusals mean, as data: what must happen next, and what an operator is told to do.

The source is Glance's own source and what it did when it was asked (`tests/contract/test_upload_failures.py` has a
test for each row). Absence of a row is `CloudRefused`: an answer that nobody understands parks the copy.

After an upload that did not end in a success the image is asked, never the answer believed: `recovery`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from autobackup.cloud.session import Answer
from autobackup.errors import AutobackupError, CloudRefused, CloudUnavailable

if TYPE_CHECKING:
    from autobackup.cloud.glance import Image


class Next(enum.StrEnum):
    """What a failure asks for."""

    WAIT = "wait"  # nothing is wrong with what we sent: later, and again
    SEND_ANEW = "send_anew"  # this image is lost: a new attempt, with a new id and a new key
    PARK = "park"  # an operator must look: the same again would get the same answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One row: what to do, and what to say."""

    next: Next
    remedy: str


_ANY: Final[Mapping[int, Failure]] = {
    401: Failure(
        next=Next.WAIT, remedy="a fresh token was refused, too; make sure that Glance and Keystone agree on the time"
    ),
    403: Failure(
        next=Next.WAIT, remedy="a role is missing, which autobackup doctor names, or a policy of Glance forbids it"
    ),
    429: Failure(next=Next.WAIT, remedy="too many requests; tried again when it allows"),
    500: Failure(next=Next.WAIT, remedy="a fault inside Glance; its log has the request id"),
    502: Failure(next=Next.WAIT, remedy="make sure that Glance runs behind its proxy"),
    503: Failure(next=Next.WAIT, remedy="Glance or its backend is overloaded or under maintenance; tried again later"),
    504: Failure(next=Next.WAIT, remedy="make sure that Glance answers its proxy in time"),
}
_SERVER_ERRORS: Final = 500
_FULL: Final = "the project's quota in Glance is full; delete images there, or make it larger"

CREATE: Final[Mapping[int, Failure]] = {
    **_ANY,
    400: Failure(next=Next.PARK, remedy="Glance will not take one of the image's properties"),
    413: Failure(next=Next.WAIT, remedy=_FULL),
}
UPLOAD: Final[Mapping[int, Failure]] = {
    **_ANY,
    400: Failure(next=Next.SEND_ANEW, remedy="fewer or more bytes came than were announced; sent anew"),
    404: Failure(next=Next.SEND_ANEW, remedy="somebody deleted the image while it was sent; sent anew"),
    409: Failure(next=Next.SEND_ANEW, remedy="somebody else changed the image's state while it was sent; sent anew"),
    410: Failure(next=Next.SEND_ANEW, remedy="somebody deleted the image while it was sent; sent anew"),
    413: Failure(next=Next.SEND_ANEW, remedy=_FULL),
    415: Failure(
        next=Next.PARK,
        remedy="Glance took it for a disk image that it must not hold; see [image_format] in glance-api.conf",
    ),
}
DELETE: Final[Mapping[int, Failure]] = {
    **_ANY,
    403: Failure(next=Next.PARK, remedy="the image is protected, or a policy forbids it; unprotect it if it may go"),
    409: Failure(next=Next.WAIT, remedy="the image is in use; tried again later"),
}
CHANGE: Final[Mapping[int, Failure]] = {
    **_ANY,
    403: Failure(
        next=Next.PARK, remedy="it is not ours to change: a role is missing in its project, or a policy forbids it"
    ),
    409: Failure(next=Next.WAIT, remedy="somebody else changed it at the same time; tried again later"),
}
READ: Final[Mapping[int, Failure]] = {
    **_ANY,
    403: Failure(next=Next.PARK, remedy="it is not ours to read: a role is missing, or a policy forbids it"),
}


def failure(answer: Answer, table: Mapping[int, Failure], place: str) -> AutobackupError:
    """The error that *answer* is, by *table*."""
    row = table.get(answer.status)
    if row is None or row.next is Next.PARK:
        remedy = f"; {row.remedy}" if row else ""
        return CloudRefused(f"{place}: {answer.words}{remedy}", status=answer.status)
    words = f"{place}: {answer.words}; {row.remedy}"
    return CloudUnavailable(words, status=answer.status, retry_after_s=answer.retry_after_s)


def may_be_there(error: CloudUnavailable | CloudRefused) -> bool:
    """Whether the data may have arrived all the same: nobody said no."""
    return isinstance(error, CloudUnavailable) and (error.status is None or error.status >= _SERVER_ERRORS)


class Recovery(enum.StrEnum):
    """What may be made of an image whose upload did not end in a success."""

    IS_THERE = "is_there"  # only the answer was lost
    ASK_AGAIN = "ask_again"  # Glance has not made up its mind yet
    PUT_AGAIN = "put_again"
    NEW_IMAGE = "new_image"


def recovery(image: "Image | None", *, is_begun: bool, sent: tuple[int, str] | None) -> Recovery:
    """
    By what Glance says of *image* now.

    *is_begun*: a byte of the body was taken, so that it cannot be sent to this image again (invariant 6). *sent*: size
    and hash of the whole body, if its last byte was taken and nobody said that it was not.
    """
    if image is None:
        return Recovery.NEW_IMAGE
    if sent is not None and image.status == "active" and (image.size_bytes, image.hash_value) == sent:
        return Recovery.IS_THERE
    if sent is not None and image.status in ("saving", "importing"):
        return Recovery.ASK_AGAIN
    if not is_begun and image.status == "queued" and image.checksum is None:
        return Recovery.PUT_AGAIN
    return Recovery.NEW_IMAGE


GONE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
