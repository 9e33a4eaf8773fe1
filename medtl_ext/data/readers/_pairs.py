"""Pair images with masks by their names, which differ only at the beginning or the end."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations, product, takewhile
from typing import NamedTuple

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import comparable

Tokens = tuple[str, ...]
_TOKEN = re.compile(r"\d+|[^\W\d_]+|.", re.DOTALL)  # a number, a word, or a character that separates them
_SAMPLE, _MOST_RULES = 10, 50  # names to learn from, and rules to try on all names


@dataclass(frozen=True, order=True)
class Name:
    """A name as tokens in one case, and its folder, which a partner must share if names alone are not unique."""

    tokens: Tokens
    folder: str
    text: str = field(compare=False)

    @classmethod
    def of(cls, text: str, folder: str = "") -> "Name":
        return cls(tuple(_TOKEN.findall(comparable(text))), comparable(folder), text)


class Rule(NamedTuple):
    """What stands before and after the shared part of two names: in the image's name, and in the mask's.

    >>> rule = Rule(((), ("_", "training")), ((), ("_", "manual", "1")))
    >>> str(rule), rule.image_of(Name.of("21_manual1")).text
    ('NAME_training with mask NAME_manual1', '21_training')
    """

    image: tuple[Tokens, Tokens]
    mask: tuple[Tokens, Tokens]

    def shared(self, mask: Name) -> Tokens | None:
        """The shared part of a mask's name; None if the name does not follow the rule."""
        before, after = self.mask
        inner = mask.tokens[len(before) : len(mask.tokens) - len(after)]
        return inner if before + inner + after == mask.tokens and (inner or mask.folder) else None

    def image_of(self, mask: Name) -> Name | None:
        """The name that the mask's image must have."""
        inner = self.shared(mask)
        if inner is None:
            return None
        (before, after), (start, end) = self.image, map("".join, self.mask)
        text = mask.text[len(start) : len(mask.text) - len(end)]
        return Name((*before, *inner, *after), mask.folder, "".join((*before, text, *after)))

    def __str__(self) -> str:
        image, mask = ("".join((*before, "NAME", *after)) for before, after in self)
        return f"{image} with mask {mask}"


_SAME = Rule(((), ()), ((), ()))


class Pairs(NamedTuple):
    """Mask -> image for every pair; mask -> expected image name for the others; and rule -> masks that follow it."""

    images: dict[Name, Name]
    alone: dict[Name, Name]
    rules: dict[Rule, list[Name]]


def learn_pairs(images: Collection[Name], masks: Collection[Name], *, together: bool = False) -> Pairs:
    """Pair masks with images by rules that hold for at least two pairs; rules that hold for most pairs come first.

    Args:
        images: each name once.
        masks: each name once.
        together: images and masks are in one list; the name of a mask is that of its image with something added.

    Raises:
        InputError: an image has two masks.

    >>> names = [Name.of(text) for text in ("p1", "p1_seg", "P2", "p2_seg", "p3", "p4_seg")]
    >>> pairs = learn_pairs(names, names, together=True)
    >>> [(image.text, mask.text) for mask, image in pairs.images.items()], [name.text for name in pairs.alone]
    ([('p1', 'p1_seg'), ('P2', 'p2_seg')], ['p4_seg'])
    """
    pairs, alone, rules = {}, {}, {}
    learnt: dict[tuple[str, Tokens], Name] = {}  # (folder, shared part of the names) -> mask
    images, masks = {image: image for image in images}, {*masks}
    least = 1 if min(len(images), len(masks)) <= 1 + together else 2
    while rule := _learn(images, masks, together, least):
        wanted = {mask: image for mask in sorted(masks) if (image := rule.image_of(mask))}
        found = {mask: images[image] for mask, image in wanted.items() if image in images}
        lost = {mask: image for mask, image in wanted.items() if mask not in found and rule != _SAME}
        learnt |= {(mask.folder, rule.shared(mask)): mask for mask in found}
        pairs, alone, rules = pairs | found, alone | lost, rules | {rule: [*found]}
        masks -= {*found, *lost, *(found.values() if together else ())}
        settled = {*found.values(), *((*found, *lost) if together else ())}
        images = {image: image for image in images if image not in settled}
    _refuse_two_masks(pairs, masks, learnt, rules)
    return Pairs(pairs, alone if together else alone | {mask: mask for mask in sorted(masks)}, rules)


def _learn(images: Collection[Name], masks: Collection[Name], together: bool, least: int) -> Rule | None:
    """The rule by which most masks find an image; among equal ones the shortest."""
    all_images, all_masks = sorted(images), sorted(masks)
    few = chain(product(_some(all_images), all_masks), product(all_images, _some(all_masks)))
    near = ((image, mask) for image, mask in few if image.folder == mask.folder and not (together and image == mask))
    votes = Counter(rule for image, mask in near for rule in _rules(image, mask))
    if together:
        votes = Counter({rule: number for rule, number in votes.items() if rule.image == _SAME.image})
    rules = [_SAME][: not together] + [rule for rule, _ in votes.most_common(_MOST_RULES)]
    support = {rule: sum(rule.image_of(mask) in images for mask in masks) for rule in rules}
    best = max(rules, key=lambda rule: (support[rule], -len(str(rule))), default=None)
    return best if best and support[best] >= (1 if best == _SAME else least) else None


def _some(names: list[Name]) -> list[Name]:
    return names[:: max(1, len(names) // _SAMPLE)]


def _rules(image: Name, mask: Name) -> Iterator[Rule]:
    """All rules that make two names a pair: one name contains the other, or they share a beginning or an end."""
    one, other = image.tokens, mask.tokens
    start, end = one[: _alike(one, other)], one[len(one) - _alike(one[::-1], other[::-1]) :]
    for shared in dict.fromkeys((one, other, _trim(start), _trim(end))):
        cuts = [_cut(tokens, shared) for tokens in (one, other)]
        if (shared or image.folder) and all(cuts):
            yield Rule(*cuts)


def _alike(one: Tokens, other: Tokens) -> int:
    """The number of equal tokens at the start."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _trim(tokens: Tokens) -> Tokens:
    """The tokens without separators at both ends."""
    words = [number for number, token in enumerate(tokens) if token.isalnum()]
    return tokens[words[0] : words[-1] + 1] if words else ()


def _cut(tokens: Tokens, shared: Tokens) -> tuple[Tokens, Tokens] | None:
    """The tokens before and after the first occurrence of ``shared``."""
    for start in range(len(tokens) - len(shared) + 1):
        if tokens[start : start + len(shared)] == shared:
            return tokens[:start], tokens[start + len(shared) :]
    return None


def _refuse_two_masks(
    pairs: dict[Name, Name], rest: Collection[Name], learnt: dict[tuple[str, Tokens], Name], rules: Collection[Rule]
) -> None:
    """Refuse a second mask of an image: an unpaired name that contains the shared part of a pair."""
    doubles, kinds = [], Counter()
    for name in sorted(rest):
        places = combinations(range(len(name.tokens) + 1), 2)
        for start, end in sorted(places, key=lambda place: place[0] - place[1]):  # the longest first
            if first := learnt.get((name.folder, name.tokens[start:end])):
                kind = name.tokens[:start], name.tokens[end:]
                doubles.append((first, name, kind))
                kinds[kind] += 1
                break
    if {*rules} == {_SAME}:  # a single one may be a mask whose image is missing
        doubles = [double for double in doubles if kinds[double[-1]] > 1]
    if doubles:
        first, name, _ = doubles[0]
        rule = next(rule for rule in rules if rule.shared(first) is not None)
        before, after = rule.mask
        start, end = (len("".join(tokens)) for tokens in (before, after))
        pattern = f"{first.text[:start]}*{first.text[len(first.text) - end :]}.*"
        more = f" (and {len(doubles) - 1} more like this)" if len(doubles) > 1 else ""
        both = f"{first.text} and with {name.text}{more}"
        raise InputError(f"{pairs[first].text} could go with {both}; leave one out, such as by 'DIR/{pattern}'.")
