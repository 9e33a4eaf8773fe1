"""Which names belong together, where an image's and its mask's share all but a beginning or an ending."""

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
    """A name in tokens, in one case, and the folder that a partner shares, where names alone do not tell."""

    tokens: Tokens
    folder: str
    text: str = field(compare=False)

    @classmethod
    def of(cls, text: str, folder: str = "") -> "Name":
        return cls(tuple(_TOKEN.findall(comparable(text))), comparable(folder), text)


class Rule(NamedTuple):
    """What stands before and after what names share: in those of the images, and of the masks.

    >>> rule = Rule(((), ("_", "training")), ((), ("_", "manual", "1")))
    >>> str(rule), rule.image_of(Name.of("21_manual1")).text
    ('NAME_training with mask NAME_manual1', '21_training')
    """

    image: tuple[Tokens, Tokens]
    mask: tuple[Tokens, Tokens]

    def shared(self, mask: Name) -> Tokens | None:
        """What is left of a mask's name; None where it is not named like this."""
        before, after = self.mask
        inner = mask.tokens[len(before) : len(mask.tokens) - len(after)]
        return inner if before + inner + after == mask.tokens and (inner or mask.folder) else None

    def image_of(self, mask: Name) -> Name | None:
        """What the mask's image would be called."""
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
    """Of every mask that has one its image; of others what it would be called; and the masks named by each rule."""

    images: dict[Name, Name]
    alone: dict[Name, Name]
    rules: dict[Rule, list[Name]]


def learn_pairs(images: Collection[Name], masks: Collection[Name], *, together: bool = False) -> Pairs:
    """Pair masks with images by rules that hold for two or more of them, those first that hold for most.

    Args:
        images: each name once.
        masks: each name once.
        together: the two are the same names, of which a mask's is that of its image and something more.

    Raises:
        InputError: an image has two masks.

    >>> names = [Name.of(text) for text in ("p1", "p1_seg", "P2", "p2_seg", "p3", "p4_seg")]
    >>> pairs = learn_pairs(names, names, together=True)
    >>> [(image.text, mask.text) for mask, image in pairs.images.items()], [name.text for name in pairs.alone]
    ([('p1', 'p1_seg'), ('P2', 'p2_seg')], ['p4_seg'])
    """
    pairs, alone, rules = {}, {}, {}
    learnt: dict[tuple[str, Tokens], Name] = {}  # what the names of a pair share, and one of its masks
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
    """The rule by which most masks find an image; of those with as many the shortest."""
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
    """Every rule by which two names could be a pair: one is in the other, or they begin or end alike."""
    one, other = image.tokens, mask.tokens
    start, end = one[: _alike(one, other)], one[len(one) - _alike(one[::-1], other[::-1]) :]
    for shared in dict.fromkeys((one, other, _trim(start), _trim(end))):
        cuts = [_cut(tokens, shared) for tokens in (one, other)]
        if (shared or image.folder) and all(cuts):
            yield Rule(*cuts)


def _alike(one: Tokens, other: Tokens) -> int:
    """How many tokens are the same before the first that is not."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _trim(tokens: Tokens) -> Tokens:
    """Without the characters that separate at both ends."""
    words = [number for number, token in enumerate(tokens) if token.isalnum()]
    return tokens[words[0] : words[-1] + 1] if words else ()


def _cut(tokens: Tokens, shared: Tokens) -> tuple[Tokens, Tokens] | None:
    """What is before and after the first place where something is found."""
    for start in range(len(tokens) - len(shared) + 1):
        if tokens[start : start + len(shared)] == shared:
            return tokens[:start], tokens[start + len(shared) :]
    return None


def _refuse_two_masks(
    pairs: dict[Name, Name], rest: Collection[Name], learnt: dict[tuple[str, Tokens], Name], rules: Collection[Rule]
) -> None:
    """Refuse a name that belongs to nothing else, and holds what the names of a pair share."""
    doubles, kinds = [], Counter()
    for name in sorted(rest):
        places = combinations(range(len(name.tokens) + 1), 2)
        for start, end in sorted(places, key=lambda place: place[0] - place[1]):  # the longest first
            if first := learnt.get((name.folder, name.tokens[start:end])):
                kind = name.tokens[:start], name.tokens[end:]
                doubles.append((first, name, kind))
                kinds[kind] += 1
                break
    if {*rules} == {_SAME}:  # a mask whose image is lost may well begin like another
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
