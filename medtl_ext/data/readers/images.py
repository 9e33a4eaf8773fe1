"""Images and masks in folders of their own, or in one, in any format."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
from PIL import Image

from medtl_ext._io import suffix_of
from medtl_ext._validation import InputError
from medtl_ext.data.collection import PathLike
from medtl_ext.data.files import FORMATS, LOSSY, NIFTI, PICTURES, for_each, read_channels
from medtl_ext.data.readers._draft import Draft, Reading, clean, comparable, held_values, stem
from medtl_ext.data.readers._pairs import Name, Pairs, learn_pairs

_MOST_CLASSES = 12  # of which a reader believes that they are classes
_WILD = re.compile(r"[*?\[]")


def read_images(
    draft: Draft,
    *,
    images: PathLike = "images",
    labels: PathLike = "labels",
    values: Mapping[str, int | Sequence[int]] | None = None,
    modalities: Sequence[str] | None = None,
    institution: str | None = None,
) -> Reading:
    """Images and masks of any format: what the names of a pair share, and what they have besides, is learnt from all.

    ``p1.png`` and ``p1_mask.png``, ``21_training.tif`` and ``21_manual1.png``, ``image_7.nii.gz`` and
    ``label_7.nii.gz`` are pairs if two or more are named like this, and the result tells what was learnt. Where names
    repeat, a pair lies in folders of one name. What has no partner is left out and noted.

    Args:
        draft: its root is the folder that ``images`` and ``labels`` start from.
        images: their folder, at any depth, or a pattern such as ``scans/*_flair.nii.gz``.
        labels: the masks' folder, or a pattern; the folder of the images if they lie together.
        values: what the values of the masks mean, by name, or their colours (``[255, 0, 0]``). Not needed if all masks
            hold one value besides 0, which is called ``foreground``.
        modalities: of several, what the images' names end in, by name or number (``p1_T1``, ``p1_0000``), or, where no
            name does, the channels of every file in their order. Else colour pictures are ``R+G+B``, others ``grey``.
        institution: of all images, where no ``institutions`` are given; else the name of their folder.

    Raises:
        InputError: also where an image could have two masks, where masks are JPEG, which changes their values, and
            where it is not said what the values mean.
    """
    above, scans = _listed(draft, images, "image", modalities or ())
    beside, masks = _listed(draft, labels, "mask")
    scans, masks, together = _tell_apart(draft, scans, masks)
    if not scans or not masks:
        raise InputError(f"{images} and {labels} are the same files; give the masks, or the images, by a pattern.")
    draft.found = f"{len(scans)} images and {len(masks)} masks"
    scans_by_name, masks_by_name = _by_names(scans, masks)
    pairs = learn_pairs([*scans_by_name], [*masks_by_name], together=together)
    if not pairs.images:
        other = "another file there and something more" if together else f"an image in {images}"
        advice = "a beginning or an ending, the same in all, may differ: rename, or give a pattern: 'DIR/*_mask.png'"
        raise InputError(f"no mask in {labels}, such as {masks[0].path.name}, is named like {other}; {advice}.")
    draft.told += _tell(draft, pairs, scans_by_name, masks_by_name)
    taken = {*pairs.images, *pairs.alone} if together else set()
    scans = [file for name, channels in scans_by_name.items() if name not in taken for file in channels.values()]
    keys = _keys(scans, modalities)
    site = institution or clean(os.path.basename(os.path.commonpath([above, beside]))) or "images"
    for file in scans:
        draft.add(file.id, "images", keys[file.path], file.path, institution=site)
    for mask, image in (pairs.images | pairs.alone).items():
        file = masks_by_name[mask][""]
        draft.add(file._replace(name=image.text).id, "labels", "mask", file.path, institution=site)
    about = _about(draft, [masks_by_name[mask][""].path for mask in pairs.images], values)
    expected = [*dict.fromkeys(keys.values())]
    if any(file.channel for file in scans):
        expected = [clean(name) for name in modalities]
    elif len(expected) > 1:  # grey and colour pictures
        expected = []
    return draft.write("images and masks", expected, name=site, license="", **about)


class _File(NamedTuple):
    """A file, its folder where that is part of its name, and the channel that was cut off ("" where none was)."""

    path: Path
    folder: str
    name: str
    channel: str = ""

    @property
    def shown(self) -> str:
        return f"{self.folder}/{self.path.name}".removeprefix("/")

    @property
    def id(self) -> str:
        return "_".join(filter(None, (*self.folder.split("/"), self.name)))


def _listed(draft: Draft, given: PathLike, what: str, channels: Sequence[str] = ()) -> tuple[Path, list[_File]]:
    """The files in a folder, or those that a pattern names, and the folder."""
    path = draft.root / given
    folder, chosen = path, None
    if not path.is_dir():
        wild = [number for number, part in enumerate(path.parts) if _WILD.search(part)]
        folder = Path(*path.parts[: wild[0]]) if wild else path
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give the folder of the {what}s, or a pattern of their names.")
        chosen = {*folder.glob("/".join(path.parts[wild[0] :]))}
    files = [
        _File(file, file.relative_to(folder).parent.as_posix().removeprefix("."), *_cut_off(stem(file), channels))
        for file in draft.find_images(FORMATS, folder)
        if chosen is None or file in chosen
    ]
    if not files:
        raise InputError(f"no {what} ({', '.join(FORMATS)}) in folder {path}; give another one.")
    return folder, files


def _tell_apart(draft: Draft, scans: Sequence[_File], masks: Sequence[_File]) -> tuple[list[_File], list[_File], bool]:
    """Images and masks where some files are listed as both; true where only names can tell."""
    of_channels, drawn = [file for file in scans if file.channel], _without(masks, scans)
    if of_channels:
        for file in _without(_without(scans, of_channels), masks):
            draft.note("", file.path, "its name ends in none of the modalities", "the file is not used")
        return of_channels, _without(masks, of_channels), False
    if not drawn and len(scans) > len(masks):
        return _without(scans, masks), [*masks], False
    if drawn and not _without(scans, masks):
        return [*scans], drawn, False
    return [*scans], [*masks], not drawn


def _cut_off(name: str, channels: Sequence[str]) -> tuple[str, str]:
    """The name without the channel that it ends in, by name or nnU-Net's number, and that channel."""
    numbers = {f"{number:04d}": channel for number, channel in enumerate(channels)}
    endings = {**numbers, **{channel: channel for channel in channels}} if len(channels) > 1 else {}
    for ending in sorted(endings, key=len, reverse=True):  # of T1 and ce-T1 the longer
        if comparable(name) == comparable(ending):
            return "", endings[ending]
        if comparable(name).endswith(tuple(f"{separator}{comparable(ending)}" for separator in "_-. ")):
            return name[: -len(ending) - 1], endings[ending]
    return name, ""


def _without(files: Sequence[_File], others: Sequence[_File]) -> list[_File]:
    paths = {file.path for file in others}
    return [file for file in files if file.path not in paths]


def _by_names(*sets: Sequence[_File]) -> list[dict[Name, dict[str, _File]]]:
    """Files by name, of several channels by channel; with their folder where a name is there twice, or is only that."""
    counts = [Counter((comparable(file.name), file.channel) for file in files) for files in sets]
    by_folder = any(not name or number > 1 for count in counts for (name, _), number in count.items())
    found = []
    for files in sets:
        named: dict[Name, dict[str, _File]] = {}
        for file in files if by_folder else [file._replace(folder="") for file in files]:
            channels = named.setdefault(Name.of(file.name, file.folder), {})
            if file.channel in channels:
                twice = channels[file.channel].path
                raise InputError(f"{twice} and {file.path} have one name; leave one out, such as by 'DIR/*.png'.")
            channels[file.channel] = file
        found.append(named)
    return found


def _tell(
    draft: Draft, pairs: Pairs, scans: Mapping[Name, dict[str, _File]], masks: Mapping[Name, dict[str, _File]]
) -> Iterator[str]:
    """What was taken for granted, to be looked at."""
    for rule, (mask, *more) in pairs.rules.items():
        image, file = next(iter(scans[pairs.images[mask]].values())), masks[mask][""]
        how = f"names: {rule}" if rule.shared(mask) else "folders"
        yield f"Paired by {how}, {len(more) + 1} of them, such as {image.shown} with {file.shown}"
    if draft.institutions is None:
        yield "Every image counts as a patient: if some are of one, say so in a column patient of institutions"


def _keys(files: Sequence[_File], modalities: Sequence[str] | None) -> dict[Path, str]:
    """What the collection calls each image: by its channel, or by all channels that it holds."""
    if len(modalities or ()) > 1:
        return {file.path: clean(file.channel) or "+".join(map(clean, modalities)) for file in files}
    keys = {}
    for file, count in zip(files, for_each(_count_channels, [file.path for file in files]), strict=True):
        if count == 3 and not modalities and suffix_of(file.path) in PICTURES:
            keys[file.path] = "R+G+B"
        elif count == 1:
            keys[file.path] = clean(modalities[0]) if modalities else "grey"
        else:
            raise InputError(f"{file.path} has {count} channels; name them with modalities, such as T1 T2.")
    return keys


def _count_channels(path: Path) -> int:
    """As the header says; 1 where a format, or a broken file, does not tell: the data check does."""
    if mode := _mode(path):
        return 3 if mode in ("RGB", "RGBA", "P") else 1
    with contextlib.suppress(Exception):
        if suffix_of(path) in NIFTI:
            return max(nibabel.load(path).shape[3:], default=1)
    return 1


def _mode(path: Path) -> str:
    """Of the pixels of a picture; empty of other files, and of broken ones."""
    with contextlib.suppress(Exception):
        if suffix_of(path) in PICTURES:
            with Image.open(path) as picture:
                return picture.mode
    return ""


def _about(
    draft: Draft, masks: Sequence[Path], values: Mapping[str, int | Sequence[int]] | None
) -> dict[str, dict[str, Any]]:
    """The collection's labels and objectives: as given, or of the one value that is in the masks."""
    if lossy := [path for path in masks if suffix_of(path) in LOSSY]:
        raise InputError(f"{lossy[0]} is a JPEG, which changes the values of a mask; give masks as they were drawn.")
    if not values:
        values = {"foreground": _only_value(masks)}
        draft.told.append(f"All masks hold one value besides 0, {values['foreground']}: it is called foreground")
    declared = {clean(name): value for name, value in values.items()}
    asked = {name: [name] for name in declared} | ({"All": [*declared]} if len(declared) > 1 else {})
    return {
        "labels": {"mask": declared},
        "objectives": {name: {"label": "mask", "values": names} for name, names in asked.items()},
    }


def _only_value(masks: Sequence[Path]) -> int | list[int]:
    """The value, or colour, that is in all masks besides 0. Of several nobody but you knows what they mean."""
    of_colour = [_mode(path) in ("RGB", "RGBA") for path in masks]
    if len({*of_colour}) > 1:
        numbers = f"{masks[of_colour.index(False)]} one of numbers; save all in one way"
        raise InputError(f"{masks[of_colour.index(True)]} is a mask in colours and {numbers}.")
    colours = any(of_colour)
    found = sorted(set().union(*for_each(held_values, [f"{path}#rgb" if colours else str(path) for path in masks])))
    if not found:
        read_channels([f"{masks[0]}#rgb" if colours else str(masks[0])])  # which says what is wrong with it
        raise InputError(f"no mask holds a value besides 0, such as {masks[0]}; give the folder of the masks.")
    if any(not float(value).is_integer() for value in found) or len(found) > _MOST_CLASSES:
        some = ", ".join(f"{value:g}" for value in found[:3])
        advice = "smoothed, or numbered objects? Make masks with a whole number for each class, or name all"
        raise InputError(f"the masks hold {len(found)} values besides 0 ({some}, ...): {advice}.")
    named = [[value >> 16, value >> 8 & 255, value & 255] if colours else int(value) for value in found]
    if len(named) > 1:
        asked = " ".join(f"NAME={str(value).strip('[]').replace(' ', '')}" for value in named)
        raise InputError(
            f"the masks hold the values {', '.join(map(str, named))} besides 0; give each its name: --values {asked}."
        )
    return named[0]
