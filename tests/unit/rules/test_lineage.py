"""Whose bytes a base has, how it is kept, and who says that he stands on it: by tables, and over every combination."""

import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import pytest
from tests.unit.container.material import HEADER

from autobackup.container import header
from autobackup.model import Anchor, Protection
from autobackup.rules.lineage import (
    MOST_PARENTS,
    BaseName,
    ImageFacts,
    Origin,
    Way,
    base_name,
    header_words,
    image_of,
    read_name,
    sealed_hint,
    stood_on,
    way,
)

IMAGE: Final = "0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"
SHA1: Final = "8d2ac5cb99ab96ed0a9fc6d11e9f2f8e9fb0c9a1"
BASE: Final = "/var/lib/nova/instances/_base"

# ---- names ------------------------------------------------------------------------------------------------


def named(origin: Origin) -> BaseName:
    return BaseName(origin=origin, image_sha1=SHA1 if origin in (Origin.IMAGE, Origin.RESIZED) else "")


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        (SHA1, Origin.IMAGE),
        (f"{SHA1}_sm", Origin.RESIZED),
        (f"{SHA1}_20", Origin.RESIZED),
        (f"{SHA1}_21474836480", Origin.RESIZED),
        ("ephemeral_20_40d1d2c", Origin.EPHEMERAL),
        ("ephemeral_1_default", Origin.EPHEMERAL),
        ("ephemeral_5_windows", Origin.EPHEMERAL),
        ("eph0_x", Origin.UNKNOWN),
        ("ephemeral", Origin.UNKNOWN),
        ("swap_1024", Origin.SWAP),
        ("swap_", Origin.UNKNOWN),
        ("swap_1024_x", Origin.UNKNOWN),
        ("swap", Origin.UNKNOWN),
        # of a file that is being made, nobody can have booted
        (f"{SHA1}.part", Origin.UNKNOWN),
        (f"{SHA1}.converted", Origin.UNKNOWN),
        # one digit more or less, and other letters, are no sha1 that Nova writes
        (SHA1[1:], Origin.UNKNOWN),
        (f"{SHA1}0", Origin.UNKNOWN),
        (f"x{SHA1}", Origin.UNKNOWN),
        (SHA1.upper(), Origin.UNKNOWN),
        (f"g{SHA1[1:]}", Origin.UNKNOWN),
        (f"{SHA1}_", Origin.UNKNOWN),
        (f"{SHA1}\n", Origin.UNKNOWN),
        (f"swap_1024{SHA1}", Origin.UNKNOWN),
        (IMAGE, Origin.UNKNOWN),
        ("disk", Origin.UNKNOWN),
        ("", Origin.UNKNOWN),
    ],
)
def test_a_name_tells_what_it_was_made_from(name: str, origin: Origin) -> None:
    for path in (f"{BASE}/{name}", name, f"/{name}", f"/{SHA1}/{name}"):
        assert read_name(path) == named(origin), path


def test_a_folder_of_that_name_tells_nothing() -> None:
    assert read_name(f"/{SHA1}/") == BaseName(origin=Origin.UNKNOWN)


def test_an_image_is_known_by_the_name_that_nova_gives_its_file() -> None:
    """The id is not in the name; whoever has ids can tell which it is."""
    others = [str(uuid.UUID(int=n)) for n in range(5)]
    assert base_name("") == "da39a3ee5e6b4b0d3255bfef95601890afd80709"  # SHA-1 of nothing, as everybody has it
    for suffix in ("", "_sm", "_20"):
        path = f"{BASE}/{base_name(IMAGE)}{suffix}"
        assert image_of(path, [*others, IMAGE]) == IMAGE
        assert image_of(path, iter((IMAGE, *others))) == IMAGE
        assert image_of(path, others) is None
        assert image_of(path, []) is None


@pytest.mark.parametrize("name", ["swap_1024", "ephemeral_20_40d1d2c", "disk", "", f"{base_name(IMAGE)}.part"])
def test_a_name_that_tells_of_no_image_has_none(name: str) -> None:
    """Whatever is asked about; an empty id, too, which an instance that was booted from a volume has."""
    assert image_of(f"{BASE}/{name}", ["", IMAGE, name]) is None


# ---- ways -------------------------------------------------------------------------------------------------

Terms = Literal["auto", "protect", "copy"]
TERMS: Final[Sequence[Terms]] = ("auto", "protect", "copy")
YES_OR_NO: Final = (False, True)


def every_image() -> Iterator[ImageFacts | None]:
    yield None
    for is_active, is_visible, is_ours in itertools.product(YES_OR_NO, repeat=3):
        for yields in (None, False, True):
            yield ImageFacts(
                is_active=is_active, is_visible_to_all=is_visible, is_ours_to_protect=is_ours, yields=yields
            )


def every_case() -> Iterator[tuple[Terms, Origin, ImageFacts | None, bool]]:
    cases = list(itertools.product(TERMS, Origin, every_image(), YES_OR_NO))
    assert len(cases) == 3 * 5 * (1 + 2 * 2 * 2 * 3) * 2
    yield from cases


def will_do(image: ImageFacts | None, *, is_readable: bool) -> bool:
    """
    Whether the image alone can stand for the base: there, for all of them, held by us, and found to have its bytes.

    Where there is no base any more, nobody can find that, and it is better than nothing.
    """
    return image is not None and (
        (image.is_active, image.is_visible_to_all, image.is_ours_to_protect) == (True, True, True)
        and (image.yields is True or (image.yields is None and not is_readable))
    )


def test_nothing_is_protected_that_cannot_stand_for_the_base() -> None:
    """Least of all an image with other bytes, or one that nobody compared while the base was there."""
    protected = 0
    for terms, origin, image, is_readable in every_case():
        if way(terms, origin, image, is_readable=is_readable)[0] is Way.PROTECT:
            assert will_do(image, is_readable=is_readable), (terms, origin, image, is_readable)
            protected += 1
    assert protected > 0


def test_what_can_be_protected_is_not_copied_unless_the_terms_say_so() -> None:
    for terms, origin, image, is_readable in every_case():
        if will_do(image, is_readable=is_readable):
            wanted = Way.COPY if terms == "copy" and is_readable else Way.PROTECT
            assert way(terms, origin, image, is_readable=is_readable)[0] is wanted


def test_terms_that_say_copy_are_met_wherever_there_is_a_file() -> None:
    for terms, origin, image, is_readable in every_case():
        if terms == "copy" and is_readable:
            assert way(terms, origin, image, is_readable=True)[0] is Way.COPY, (origin, image)


def test_a_file_that_is_gone_is_never_copied() -> None:
    for terms, origin, image, is_readable in every_case():
        if way(terms, origin, image, is_readable=is_readable)[0] is Way.COPY:
            assert is_readable, (terms, origin, image)


def test_it_is_refused_under_protect_only_and_only_what_has_an_image() -> None:
    """Ephemeral disks and swap have none to protect: under the same terms these are copied."""
    for terms, origin, image, is_readable in every_case():
        chosen = way(terms, origin, image, is_readable=is_readable)[0]
        has_image = origin in (Origin.IMAGE, Origin.RESIZED)
        must_refuse = terms == "protect" and has_image and is_readable and not will_do(image, is_readable=True)
        assert (chosen is Way.REFUSE) == must_refuse, (terms, origin, image, is_readable)


def test_it_is_given_up_only_where_neither_file_nor_image_is_left() -> None:
    """Otherwise a backup would go without what could have been kept for it."""
    for terms, origin, image, is_readable in every_case():
        chosen = way(terms, origin, image, is_readable=is_readable)[0]
        nothing_left = not is_readable and not will_do(image, is_readable=False)
        assert (chosen is Way.NONE) == nothing_left, (terms, origin, image, is_readable)


def test_the_reason_is_said_whenever_it_is_not_protected() -> None:
    for terms, origin, image, is_readable in every_case():
        chosen, why = way(terms, origin, image, is_readable=is_readable)
        assert bool(why) == (chosen is not Way.PROTECT), (terms, origin, image, is_readable)
        assert ("the file is gone" in why) == (chosen is Way.NONE)


GOOD: Final = {"is_active": True, "is_visible_to_all": True, "is_ours_to_protect": True, "yields": True}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "not to be found"),
        ({"is_active": False}, "not active"),
        ({"yields": False}, "other bytes"),
        ({"yields": None}, "not compared"),
        ({"is_visible_to_all": False}, "not everybody"),
        ({"is_ours_to_protect": False}, "not ours to protect"),
    ],
)
def test_an_operator_is_told_what_is_wrong_with_the_image(wrong: Mapping[str, bool | None] | None, words: str) -> None:
    image = None if wrong is None else ImageFacts(**{**GOOD, **wrong})  # type: ignore[arg-type]
    for terms, chosen in (("auto", Way.COPY), ("protect", Way.REFUSE)):
        found, why = way(terms, Origin.IMAGE, image, is_readable=True)  # type: ignore[arg-type]
        assert (found, words in why) == (chosen, True), why
    assert "terms" in way("copy", Origin.IMAGE, image, is_readable=True)[1]
    if wrong != {"yields": None}:
        assert words in way("auto", Origin.IMAGE, image, is_readable=False)[1]


# ---- words of a header ------------------------------------------------------------------------------------


def paths_of(count: int) -> list[str]:
    return [f"{BASE}/{n:040x}" for n in range(count)]


def every_anchoring(paths: Sequence[str]) -> Iterator[list[Anchor]]:
    """Each parent kept in each of the ways, or not at all."""
    for kinds in itertools.product((None, *Protection), repeat=len(paths)):
        yield [
            Anchor(path=path, parent=str(uuid.UUID(int=n + 1)), protection=kind)
            for n, (path, kind) in enumerate(zip(paths, kinds, strict=True))
            if kind is not None
        ]


@pytest.mark.parametrize("image", ["", IMAGE])
@pytest.mark.parametrize("count", range(5))
def test_what_a_header_says_is_read_back(count: int, image: str) -> None:
    paths = paths_of(count)
    for anchors in every_anchoring(paths):
        words = header_words(paths, image, anchors)
        assert stood_on(words) == {anchor.parent for anchor in anchors}
        by_path = {anchor.path: anchor for anchor in anchors}
        for number, path in enumerate(paths):
            anchor = by_path.get(path)
            is_sealed = anchor is not None and anchor.protection is Protection.COPY
            assert sealed_hint(words, number) == (anchor.parent if anchor and is_sealed else None)
        assert sealed_hint(words, count) is None
        assert (words is None) == (not anchors and not image)
        assert (words or {}).get("image", "") == image


def test_the_words_are_those_of_the_format() -> None:
    """docs/format.md: headers are read for years, by others, too."""
    paths = paths_of(3)
    anchors = [
        Anchor(path=paths[2], parent="c", protection=Protection.PROTECTED),
        Anchor(path=paths[0], parent="a", protection=Protection.COPY),
        Anchor(path=paths[1], parent="b", protection=Protection.POLICY),
    ]
    assert header_words(paths, IMAGE, anchors) == {
        "image": IMAGE,
        "base_0": "sealed:a",
        "base_1": "image:b",
        "base_2": "image:c",
    }


def test_the_order_of_the_anchors_makes_no_difference() -> None:
    paths = paths_of(3)
    for anchors in every_anchoring(paths):
        assert header_words(paths, IMAGE, anchors[::-1]) == header_words(paths, IMAGE, anchors)


def test_one_parent_of_several_disks_is_stood_on_once() -> None:
    paths = paths_of(2)
    anchors = [Anchor(path=path, parent=IMAGE, protection=Protection.POLICY) for path in paths]
    assert stood_on(header_words(paths, IMAGE, anchors)) == {IMAGE}


def test_an_image_that_is_only_named_is_not_stood_on() -> None:
    """Headers of before say which image it was, and nobody kept that image for them."""
    assert stood_on({"image": IMAGE}) == frozenset()
    assert stood_on(None) == frozenset()
    assert sealed_hint({"image": IMAGE}, 0) is None
    assert sealed_hint(None, 0) is None


def test_the_longest_chain_has_room_in_a_header() -> None:
    """With every one of them sealed, which takes the most."""
    paths = paths_of(MOST_PARENTS)
    anchors = [Anchor(path=path, parent=str(uuid.uuid4()), protection=Protection.COPY) for path in paths]
    words = header_words(paths, IMAGE, anchors)
    made = header.Header(**{**{name: getattr(HEADER, name) for name in HEADER.__slots__}, "parent": words})
    assert header.decode(header.encode(made)).parent == words
    assert len(stood_on(words)) == MOST_PARENTS
