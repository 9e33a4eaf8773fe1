"""Source cards: a description of somebody else's network, of the images it expects, and of its output."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from medtl_ext._validation import InputError, require_choice, require_name
from medtl_ext.data.collection import first_fault, read_json
from medtl_ext.networks import read_weights

TAGS = ("institution", "modality", "objective")
PROGRAMS = (".ts", ".pt2")
"""Files that hold code as well as weights: TorchScript and ``torch.export``."""
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Axes = tuple[int, ...]


class Card(BaseModel):
    """The description of a network: one JSON file, or the same keys in a list of sources.

    ``docs/sources.md`` explains every key. Axes are those of the preprocessed image. None means: as in the bundle or
    the target; for `dimensions` and `layer`: as found in the network.

    Attributes:
        folder: folder of its files; files outside are not read. Not a key of the JSON file.
        trusted: its code may run. Not a key of the JSON file.

    >>> Card(classes=("background", "lesion"), window=(64, 64)).n_classes
    2
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = ""
    checkpoint: str | None = None
    network: dict[str, Any] | None = None
    channels: Names | None = None
    fill: Literal["mean"] | None = None
    preprocessing: tuple[dict[str, Any], ...] | None = None
    axes: Axes | None = None
    dimensions: Literal[2, 3] | None = None
    window: Axes | None = None
    overlap: float = Field(default=0.5, ge=0, lt=1)
    blending: Literal["gaussian", "constant", "nnunet"] = "gaussian"
    mirror: Axes = ()
    output: Literal["logits", "softmax", "sigmoid"] = "logits"
    classes: Names | int | None = None
    pick: int | str | None = None
    layer: str | None = None
    encoder: str | None = None
    convolutions: tuple[str, str] | None = None
    batch_size: int | None = Field(default=None, ge=1)
    institution: str | None = None
    modality: str | None = None
    objective: str | None = None
    description: str | None = None
    trained_on: str | None = None
    licence: str | None = None
    folder: str = Field(default="", exclude=True)
    trusted: bool = Field(default=False, exclude=True)

    @model_validator(mode="after")
    def _fits_together(self) -> "Card":
        for name in ("axes", "mirror"):
            axes = getattr(self, name) or ()
            if len(set(axes)) < len(axes) or (name == "axes" and axes and set(axes) != set(range(len(axes)))):
                raise ValueError(f"{name} must name spatial axes, each once, such as [2, 1, 0]; found {list(axes)}")
        if self.name:  # it becomes the name of a folder
            require_name("name", self.name)
        if self.window is not None and (len(self.window) not in (2, 3) or min(self.window) < 1):
            raise ValueError(f"window must be two or three sizes in voxels; found {list(self.window)}")
        if self.channels and len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels must have different names; found {list(self.channels)}")
        return self

    @property
    def tags(self) -> dict[str, str]:
        return {tag: value for tag in TAGS if (value := getattr(self, tag)) is not None}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None if isinstance(self.classes, int) else self.classes

    @property
    def n_classes(self) -> int | None:
        return self.classes if isinstance(self.classes, int | None) else len(self.classes)

    @property
    def foreign(self) -> bool:
        """It brings its own network, instead of using the one that our bundle defines."""
        return self.network is not None or self.is_program

    @property
    def is_program(self) -> bool:
        return self.network is None and Path(self.checkpoint or "").suffix in PROGRAMS

    def weights(self) -> dict[str, Tensor]:
        """The tensors of its checkpoint.

        Raises:
            InputError: there is no checkpoint, or a tensor holds NaN or Inf.
        """
        if self.checkpoint is None:
            raise InputError("it has no weights; give its checkpoint")
        found = read_weights(self.checkpoint)
        for name, value in found.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise InputError(f"its weights hold NaN or Inf ({name}): the training diverged, or the file is damaged")
        return found


def read_card(source: Path | Mapping[str, Any], *, trust: bool = False, folder: Path | None = None) -> Card:
    """Read a card from a file, or from a mapping of its keys; paths in a file are relative to the file.

    Raises:
        InputError: no JSON, an unknown key, or an invalid value.

    >>> read_card({"checkpoint": "net.pt", "classes": ["background", "lesion"]}).n_classes
    2
    """
    if isinstance(source, Mapping):
        where, content, folder = f"source {source.get('name', dict(source))}", dict(source), folder or Path()
    else:
        where, folder, content = str(source), source.parent, read_json(source)
        content.setdefault("name", source.stem)
        if isinstance(content.get("checkpoint"), str):
            content["checkpoint"] = str(folder / content["checkpoint"])
    for key in content:
        require_choice(f"{where}: key", key, [name for name in Card.model_fields if name not in ("folder", "trusted")])
    try:
        card = Card.model_validate_json(json.dumps(content | {"folder": str(folder), "trusted": trust}))
    except ValidationError as error:
        raise first_fault(where, error, content) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} holds a value that JSON cannot express ({error}).") from error
    if not card.name and card.checkpoint:
        card = card.model_copy(update={"name": Path(card.checkpoint).stem})
    return card


def channel_order(
    wanted: Sequence[str] | None, given: Sequence[str], *, fill: str | None
) -> tuple[list[int | None], list[int]]:
    """Which channels of the target a network gets, in its order (None: a constant), and the target's other channels.

    Channels are matched by name, in any case. If no name matches and the numbers are equal, they are matched by
    position. A grey image can stand for red, green and blue.

    Raises:
        InputError: the target lacks a channel and ``fill`` is None, or it lacks all channels.

    >>> channel_order(["R", "G", "B"], ["B", "G", "R"], fill=None)
    ([2, 1, 0], [])
    >>> channel_order(["FLAIR"], ["T1", "FLAIR"], fill=None)
    ([1], [0])
    >>> channel_order(["MRI"], ["T1"], fill=None)
    ([0], [])
    >>> channel_order(["R", "G", "B"], ["grey"], fill=None)
    ([0, 0, 0], [])
    """
    names = [channel.casefold() for channel in given]
    if names == ["grey"] and [one.casefold() for one in wanted or given] == ["r", "g", "b"]:
        return [0, 0, 0], []
    order = [names.index(one.casefold()) if one.casefold() in names else None for one in wanted or given]
    if all(place is None for place in order) and len(order) == len(given):
        order = list(range(len(given)))
    lacking = [one for one, place in zip(wanted or given, order, strict=True) if place is None]
    if lacking and (fill is None or len(lacking) == len(order)):
        verb, they = ("is", "it") if len(lacking) == 1 else ("are", "them")
        hint = f'; "fill": "mean" in its card makes {they} a constant' if len(lacking) < len(order) else ""
        takes = f"it takes channel{'s'[: len(order) > 1]} {', '.join(wanted)}"
        has = f"but the target's images have {', '.join(given)}"
        raise InputError(f"{takes}, {has}: {', '.join(lacking)} {verb} missing{hint}")
    return order, [place for place in range(len(given)) if place not in order]
