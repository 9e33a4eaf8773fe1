"""Images and masks of any format, in two folders or in one."""

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

_MOST_CLASSES = 12  # masks with more values are probably smoothed, or have numbered objects
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
    """Images and masks of any format, paired by rules that are learnt from all file names.

    ``p1.png`` and ``p1_mask.png``, ``21_training.tif`` and ``21_manual1.png``, or ``image_7.nii.gz`` and
    ``label_7.nii.gz`` are pairs if at least two pairs follow the rule; the result names the rule. If names repeat, both
    files of a pair must be in folders of the same name. A file without a partner is left out and noted.

    Args:
        draft: its root is the folder that ``images`` and ``labels`` start from.
        images: folder of the images, at any depth, or a pattern such as ``scans/*_flair.nii.gz``.
        labels: folder of the masks, or a pattern; it may be the folder of the images.
        values: what the values of the masks mean, by name: numbers, or colours (``[255, 0, 0]``). Not needed if all
            masks hold one value besides 0; it is then called ``foreground``.
        modalities: endings of the images' names, by name or number (``p1_T1``, ``p1_0000``); or, if no name has such an
            ending, the channels of every file in order. By default colour pictures are ``R+G+B``, others ``grey``.
        institution: of all images, if ``institutions`` is not given; by default the name of their folder.

    Raises:
        InputError: also if an image could have two masks, if masks are JPEG (which changes their values), or if it is
            not clear what the values mean.
    """
    above, scans = _listed(draft, images, "image", modalities or ())
    beside, masks = _listed(draft, labels, "mask")
    scans, masks, together = _tell_apart(draft, scans, masks)
    if not scans or not masks:
        raise InputError(f"--images {images} and --labels {labels} name the same files; give one of them as a pattern.")
    draft.found = f"{len(scans)} images and {len(masks)} masks"
    scans_by_name, masks_by_name = _by_names(scans, masks)
    pairs = learn_pairs([*scans_by_name], [*masks_by_name], together=together)
    if not pairs.images:
        other = "another file there with something added" if together else f"an image in {images}"
        advice = "names may differ by one beginning or ending, the same in all: rename, or give a pattern 'DIR/*_m.png'"
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
    """A file, its folder if that is part of its name, and the channel that its name ended in ("": none)."""

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
    """The folder, and the files in it or those that a pattern matches."""
    path = draft.root / given
    folder, chosen = path, None
    if not path.is_dir():
        wild = [number for number, part in enumerate(path.parts) if _WILD.search(part)]
        folder = Path(*path.parts[: wild[0]]) if wild else path
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give the folder of the {what}s, or a pattern of file names.")
        chosen = {*folder.glob("/".join(path.parts[wild[0] :]))}
    files = [
        _File(file, file.relative_to(folder).parent.as_posix().removeprefix("."), *_cut_off(stem(file), channels))
        for file in draft.find_images(FORMATS, folder)
        if chosen is None or file in chosen
    ]
    if not files:
        raise InputError(f"no {what} ({', '.join(FORMATS)}) in folder {path}; give another folder or pattern.")
    return folder, files


def _tell_apart(draft: Draft, scans: Sequence[_File], masks: Sequence[_File]) -> tuple[list[_File], list[_File], bool]:
    """Separate images and masks if some files are listed as both; True if only the names can separate them."""
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
    """Split a name into the part before its channel (a name, or nnU-Net's number) and the channel."""
    numbers = {f"{number:04d}": channel for number, channel in enumerate(channels)}
    endings = {**numbers, **{channel: channel for channel in channels}} if len(channels) > 1 else {}
    for ending in sorted(endings, key=len, reverse=True):  # ce-T1 before T1
        if comparable(name) == comparable(ending):
            return "", endings[ending]
        if comparable(name).endswith(tuple(f"{separator}{comparable(ending)}" for separator in "_-. ")):
            return name[: -len(ending) - 1], endings[ending]
    return name, ""


def _without(files: Sequence[_File], others: Sequence[_File]) -> list[_File]:
    paths = {file.path for file in others}
    return [file for file in files if file.path not in paths]


def _by_names(*sets: Sequence[_File]) -> list[dict[Name, dict[str, _File]]]:
    """Files by name and channel; the folder becomes part of the name if a name repeats or is empty."""
    counts = [Counter((comparable(file.name), file.channel) for file in files) for files in sets]
    by_folder = any(not name or number > 1 for count in counts for (name, _), number in count.items())
    found = []
    for files in sets:
        named: dict[Name, dict[str, _File]] = {}
        for file in files if by_folder else [file._replace(folder="") for file in files]:
            channels = named.setdefault(Name.of(file.name, file.folder), {})
            if file.channel in channels:
                twice = channels[file.channel].path
                raise InputError(f"{twice} and {file.path} have one name; exclude one, such as by 'DIR/*.png'.")
            channels[file.channel] = file
        found.append(named)
    return found


def _tell(
    draft: Draft, pairs: Pairs, scans: Mapping[Name, dict[str, _File]], masks: Mapping[Name, dict[str, _File]]
) -> Iterator[str]:
    """What was inferred, for the user to check."""
    for rule, (mask, *more) in pairs.rules.items():
        image, file = next(iter(scans[pairs.images[mask]].values())), masks[mask][""]
        how = f"names: {rule}" if rule.shared(mask) else "folders"
        yield f"Paired by {how}, {len(more) + 1} of them, such as {image.shown} with {file.shown}"
    if draft.institutions is None:
        yield "Every image counts as a patient: if patients have several, add a column patient to --institutions"


def _keys(files: Sequence[_File], modalities: Sequence[str] | None) -> dict[Path, str]:
    """The name of each image in the collection: its channel, or all channels that it holds."""
    if len(modalities or ()) > 1:
        return {file.path: clean(file.channel) or "+".join(map(clean, modalities)) for file in files}
    keys = {}
    for file, count in zip(files, for_each(_count_channels, [file.path for file in files]), strict=True):
        if count == 3 and not modalities and suffix_of(file.path) in PICTURES:
            keys[file.path] = "R+G+B"
        elif count == 1:
            keys[file.path] = clean(modalities[0]) if modalities else "grey"
        else:
            raise InputError(f"{file.path} has {count} channels; name them with --modalities, such as T1 T2.")
    return keys


def _count_channels(path: Path) -> int:
    """Number of channels in the header; 1 if the header cannot be read, which the data check reports."""
    if mode := _mode(path):
        return 3 if mode in ("RGB", "RGBA", "P") else 1
    with contextlib.suppress(Exception):
        if suffix_of(path) in NIFTI:
            return max(nibabel.load(path).shape[3:], default=1)
    return 1


def _mode(path: Path) -> str:
    """The pixel mode of a picture; empty for other files and for broken ones."""
    with contextlib.suppress(Exception):
        if suffix_of(path) in PICTURES:
            with Image.open(path) as picture:
                return picture.mode
    return ""


def _about(
    draft: Draft, masks: Sequence[Path], values: Mapping[str, int | Sequence[int]] | None
) -> dict[str, dict[str, Any]]:
    """The collection's labels and objectives: as given, or for the only value in the masks."""
    if lossy := [path for path in masks if suffix_of(path) in LOSSY]:
        raise InputError(f"{lossy[0]} is a JPEG, which changes the values of a mask; give the original masks.")
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
    """The only value, or colour, in the masks besides 0; if there are several, the user must name them."""
    of_colour = [_mode(path) in ("RGB", "RGBA") for path in masks]
    if len({*of_colour}) > 1:
        numbers = f"{masks[of_colour.index(False)]} holds numbers; save all masks in one way"
        raise InputError(f"{masks[of_colour.index(True)]} is a mask in colours, but {numbers}.")
    colours = any(of_colour)
    found = sorted(set().union(*for_each(held_values, [f"{path}#rgb" if colours else str(path) for path in masks])))
    if not found:
        read_channels([f"{masks[0]}#rgb" if colours else str(masks[0])])  # raises if the file is broken
        raise InputError(f"no mask holds a value besides 0, such as {masks[0]}; give the folder of the masks.")
    if any(not float(value).is_integer() for value in found) or len(found) > _MOST_CLASSES:
        some = ", ".join(f"{value:g}" for value in found[:3])
        advice = "were they smoothed, or are objects numbered? Save one whole number per class, or name all by --values"
        raise InputError(f"the masks hold {len(found)} values besides 0 ({some}, ...): {advice}.")
    named = [[value >> 16, value >> 8 & 255, value & 255] if colours else int(value) for value in found]
    if len(named) > 1:
        asked = " ".join(f"NAME={str(value).strip('[]').replace(' ', '')}" for value in named)
        some = ", ".join(map(str, named))
        raise InputError(f"the masks hold the values {some} besides 0; name each of them: --values {asked}.")
    return named[0]
