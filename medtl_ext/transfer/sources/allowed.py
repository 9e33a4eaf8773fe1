"""What a stranger's card or bundle may name, as data (``allowed.json``), and how that is built: nothing else ever is.

Definitions are MONAI's (``_target_`` and arguments), but nothing in them is evaluated: a target is looked up in the
list, its arguments are plain values, and whatever would download is switched off, since a source brings its weights.
"""

import importlib.util
import inspect
import json
import math
import os
import pydoc
import re
import sys
import types
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai.transforms
import torch
from monai.bundle import ConfigParser
from monai.transforms import MapTransform, Resized, Zoomd
from torch import nn

from medtl_ext._validation import InputError, first_line
from medtl_ext.transforms import EachKeyd

#: The lists of ``allowed.json``.
ALLOWED: dict[str, Any] = json.loads(Path(__file__).with_name("allowed.json").read_text(encoding="utf-8"))
TRUST = "which only --trust_sources true would do"
MOST_BYTES = 2**24  # of a config
MOST_PARAMETERS = 10**9  # a larger network is a mistake or malice: it would not fit into memory
LARGEST_NUMBER = 10**6  # of a network's arguments, for the same reason
PAD_ARGUMENTS = ("value", "constant_values")  # those of the paddings' **kwargs that mean something
PRIVATE = "_medtl_source_"


def inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """The file that a path relative to a folder means, symlinks followed, if it lies in that folder.

    Raises:
        InputError: it leads out of the folder, by ``..``, as an absolute path or through a symlink.

    >>> inside("/data/zoo", "../../etc/passwd")
    Traceback (most recent call last):
    medtl_ext._validation.InputError: ../../etc/passwd leads out of the source's folder, so it is not read
    """
    found = (Path(folder) / path).resolve()
    if not found.is_relative_to(Path(folder).resolve()):
        raise InputError(f"{path} leads out of the source's folder, so it is not read")
    return found


def read_mapping(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What a JSON or YAML file in a source's folder holds.

    Raises:
        InputError: there is none, it leads out of the folder, is huge, damaged, or holds no mapping.
    """
    path = inside(folder, name)
    if not path.is_file():
        raise InputError(f"its {name} is no file")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"its {name} is larger than {MOST_BYTES} bytes")
    try:
        content = ConfigParser.load_config_file(path)
    except Exception as error:  # of two parsers, on anything
        raise InputError(f"its {name} is no JSON or YAML ({type(error).__name__}: {first_line(error):.100})") from error
    if not isinstance(content, dict):
        raise InputError(f"its {name} holds no mapping")
    return content


def built_network(
    definition: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, trust: bool = False
) -> nn.Module:
    """A fresh network of a definition, without evaluating anything in it and without downloading anything.

    Args:
        definition: ``_target_`` and plain arguments. The target is a class of the packages in `ALLOWED` (a name without
            dots is one of ``monai.networks.nets``), ``timm.create_model``, or ``file.py:Class`` in ``folder``.
        folder: where the files of the source lie.
        trust: a file of the source may be run.

    Raises:
        InputError: the target is not on the list, an argument is unknown, an expression or something to be built that
            is not on the list either, the package is not installed, or the network cannot be built.

    >>> built_network({"_target_": "BasicUNet", "spatial_dims": 2, "out_channels": 3}).final_conv
    Conv2d(32, 3, kernel_size=(1, 1), stride=(1, 1))
    >>> built_network({"_target_": "os.system", "command": "true"})
    Traceback (most recent call last):
    medtl_ext._validation.InputError: network os.system is not on the list of what may be built (see docs/sources.md)
    """
    factory, arguments = checked_network(definition, folder, trust)
    where = f"network {definition['_target_']}"
    try:
        if ".py:" not in definition["_target_"]:
            _check_size(where, factory, arguments)
        network = factory(**arguments)
    except InputError:
        raise
    except Exception as error:  # whatever a stranger's network raises on arguments of his
        raise InputError(f"{where} cannot be built from its arguments ({first_line(error)})") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{where} is no network but {type(network).__name__}")
    return network


def checked_network(
    definition: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, trust: bool = False
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What builds a network and with which arguments; see `built_network`, which also does it."""
    target = definition.get("_target_") if isinstance(definition, Mapping) else None
    if not isinstance(target, str):
        raise InputError(f"network is {definition!r:.200}; expected a definition with a _target_, such as BasicUNet")
    where = f"network {target}"
    factory = _of_file(target, folder, trust) if ".py:" in target else _listed(target)
    name = target.rpartition(".")[2]

    def nested(value: Mapping[str, Any]) -> Any:
        if value["_target_"] not in ALLOWED["values"]:
            return built_network(value, folder, trust)
        return pydoc.locate(value["_target_"])(**_arguments(where, value))

    obsolete = {"_target_", *ALLOWED["obsolete"].get(name, ())}
    arguments = _arguments(where, definition, obsolete, nested, LARGEST_NUMBER)
    for key in ALLOWED["names"]:
        if isinstance(arguments.get(key), str) and not re.fullmatch(r"[\w.-]+", arguments[key]):
            raise InputError(f"{where}: {key} {arguments[key]!r} is no plain name (a hub's address would be fetched)")
    if any(arguments.get(key) for key in ALLOWED["off"]):
        arguments |= ALLOWED["as_pretrained"].get(name, {}).get(arguments.get("model_name"), {})
    parameters = inspect.signature(factory).parameters
    arguments |= {key: value for key, value in ALLOWED["off"].items() if key in arguments or key in parameters}
    if target.startswith("dynamic_network_architectures."):
        for key in ALLOWED["classes"]:
            if isinstance(arguments.get(key), str):
                arguments[key] = _listed(arguments[key])
    _check_arguments(where, factory, arguments)
    return factory, arguments


def transforms_of(
    preprocessing: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("image", "label")
) -> list[MapTransform]:
    """The preprocessing of a card: MONAI's dictionary transforms, those of the list only.

    Spatial ones act on every key, on all but the first by nearest neighbour and without padded values; intensity
    ones act on the first, all its channels or those of the argument ``channels`` (which is ours, numbers from 0). What
    the flow does itself (loading, channels first, types, devices) is left out.

    Args:
        preprocessing: each ``_target_`` and plain arguments, without keys.
        keys: of the image and then of the labels.

    Raises:
        InputError: a transform that is not on the list, or an argument that is unknown or no plain value.

    >>> steps = [{"_target_": "Spacingd", "pixdim": [1, 1, 2]}, {"_target_": "ScaleIntensityd", "minv": 0, "maxv": 1}]
    >>> [(type(one).__name__, *one.keys) for one in transforms_of(steps)]
    [('Spacingd', 'image'), ('Spacingd', 'label'), ('ScaleIntensityd', 'image')]
    """
    if isinstance(preprocessing, str | Mapping) or not isinstance(preprocessing, Sequence):
        raise InputError(f"preprocessing is {preprocessing!r:.200}; expected a list of MONAI's dictionary transforms")
    return [transform for step in preprocessing for transform in _transforms_of(step, *keys)]


def _transforms_of(step: Mapping[str, Any], image: str, *labels: str) -> Iterator[MapTransform]:
    target = step.get("_target_") if isinstance(step, Mapping) else None
    kind = kind_of_transform(target)
    if kind is None:
        raise InputError(f"preprocessing {target or step!s:.200} is not on the list (see docs/sources.md)")
    if kind in ("dropped", "gone", "channels"):
        return
    where, name = f"preprocessing {target}", _short(target)
    factory = pydoc.locate(name) if "." in name else getattr(monai.transforms, name)
    given = ALLOWED["defaults"].get(name, {}) | _arguments(where, step)
    for key in ("keys", "source_key", "allow_missing_keys", "lazy"):
        if key in given:
            raise InputError(f"{where} has {key}, which is set here; leave it out")
    channels = given.pop("channels", None) if kind == "intensity" else None

    def made(names: Sequence[str], **changed: Any) -> MapTransform:
        arguments = given | changed | {"keys": list(names)}
        _check_arguments(where, factory, arguments)
        try:
            return factory(**arguments)
        except Exception as error:  # whatever MONAI raises on arguments that fit by name alone
            raise InputError(f"{where} cannot be made of its arguments ({first_line(error)})") from error

    if kind == "foreground":  # one box for all, that of the image
        names, modes = [image, *labels], [given.get("mode", "constant"), *["constant"] * len(labels)]
        yield made(names, source_key=image, mode=modes, start_coord_key=None, end_coord_key=None)
    elif kind == "intensity":
        yield made([image]) if channels is None else OnChannelsd(made([image]), channels)
    else:
        yield made([image])
        smooth = ("align_corners", "anti_aliasing", "anti_aliasing_sigma", *PAD_ARGUMENTS)
        given = {key: value for key, value in given.items() if key not in smooth}
        for label in labels:
            yield made([label], **({"mode": _nearest(factory)} if kind == "resampled" else {}))


def _nearest(factory: Callable) -> str:
    """How labels are resampled; by size torch's plain "nearest" would move them half a voxel off the image."""
    return "nearest-exact" if factory in (Resized, Zoomd) else "nearest"


class OnChannelsd(EachKeyd):
    """An intensity transform on some channels (numbers from 0) of an image; the others stay as they are.

    >>> double = monai.transforms.ScaleIntensityRanged("image", 0, 1, 0, 2)
    >>> OnChannelsd(double, [0])({"image": torch.ones(2, 1, 1)})["image"].flatten().tolist()
    [2.0, 1.0]
    """

    def __init__(self, transform: MapTransform, channels: Sequence[int]) -> None:
        super().__init__(transform.keys)
        listed = isinstance(channels, list | tuple) and len(channels) > 0
        if not listed or not all(type(one) is int and one >= 0 for one in channels):
            raise InputError(f"channels is {channels!r}; expected a list of numbers from 0")
        self.transform, self.channels = transform, list(channels)

    def changed(self, given: torch.Tensor) -> torch.Tensor:
        image, (key,) = given.clone(), self.keys
        if max(self.channels) >= len(image):
            raise InputError(f"a transform of channels {self.channels} meets an image of {len(image)}")
        image[self.channels] = self.transform({key: image[self.channels]})[key].to(image.dtype)
        return image


def kind_of_transform(target: Any) -> str | None:
    """The list of `ALLOWED` that a transform is in; None: in none.

    >>> kind_of_transform("monai.transforms.SpacingD"), kind_of_transform("RandFlipd")
    ('resampled', None)
    """
    if not isinstance(target, str):
        return None
    name = _short(target)
    if {target, target.rpartition(".")[2] if target.startswith("monai.") else ""} & ALLOWED["channels"].keys():
        return "channels"
    return next((kind for kind, names in ALLOWED["transforms"].items() if name in names), None)


def _short(target: str) -> str:
    """MONAI's own name of a transform, which has aliases in D and Dict."""
    if target.startswith("monai.transforms."):
        target = target.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0])(D|Dict)$", "d", target)


def _arguments(
    where: str,
    definition: Mapping[str, Any],
    without: Container[str] = ("_target_",),
    build: Callable[[Mapping[str, Any]], Any] | None = None,
    most: float = math.inf,
) -> dict[str, Any]:
    try:
        given = {str(key): value for key, value in definition.items() if key not in without}
        return {key: _plain(f"{where}, {key}", value, build, most) for key, value in given.items()}
    except RecursionError as error:
        raise InputError(f"{where}: its arguments are nested too deeply") from error


def _plain(where: str, value: Any, build: Callable[[Mapping[str, Any]], Any] | None, most: float) -> Any:
    """The value, if it is one that JSON knows and nothing in it asks for evaluation."""
    if isinstance(value, str):
        if value.lstrip()[:1] in tuple("$@%"):
            raise InputError(f"{where}: {value!r:.200} is an expression or reference; give a plain value")
        return value
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return {str(key): _plain(where, one, build, most) for key, one in value.items()}
        if build is None:
            raise InputError(f"{where}: {value['_target_']!r:.200} would have to be built; give plain values")
        return build(value)
    if isinstance(value, list | tuple):
        return [_plain(where, one, build, most) for one in value]
    if value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{where}: {value!r:.200} is no plain value")
    if value is not None and (value != value or abs(value) > most):
        raise InputError(f"{where}: {value!r:.20} is no number of a network")
    return value


def _check_arguments(where: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Every argument is known and none is called by whoever gets it."""
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
    if not (isinstance(factory, type) and issubclass(factory, MapTransform)):
        return
    for key, value in arguments.items():
        parameter = signature.parameters.get(key)
        if parameter is None and key not in ("keys", *PAD_ARGUMENTS):
            raise InputError(f"{where}: got an unexpected keyword argument {key!r}")
        if "Callable" in str(getattr(parameter, "annotation", "")) and isinstance(value, str):
            raise InputError(f"{where}: {key} is called, so it cannot be given")


def _listed(target: str) -> Callable[..., Any]:
    """The class or function of a name that is on the list."""
    path = target if "." in target else f"monai.networks.nets.{target}"
    prefixes = ALLOWED["networks"] | ALLOWED["functions"]
    prefix = next((one for one in prefixes if path.startswith(one) and (one.endswith(".") or path == one)), None)
    refused = InputError(f"network {target} is not on the list of what may be built (see docs/sources.md)")
    if prefix is None or path.rpartition(".")[2] in ALLOWED["never"]:
        raise refused
    if importlib.util.find_spec(path.partition(".")[0]) is None:
        raise InputError(f"network {target} needs the package {prefixes[prefix]}, which is not installed")
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"network {target}: its package cannot be imported ({first_line(error.value)})") from error
    if prefix in ALLOWED["functions"]:
        return found
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(prefix)):
        raise refused
    return found


def _check_size(where: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Counts parameters on torch's device without memory."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in factory(**arguments).parameters())
    except Exception:  # not every network can be built without values; what is wrong with others is said when they are
        return
    if size > MOST_PARAMETERS:
        raise InputError(f"{where} would have {size:.1e} parameters; no more than {MOST_PARAMETERS:.0e} are built")


def _of_file(target: str, folder: str | os.PathLike[str] | None, trust: bool) -> Callable[..., Any]:
    """A class in a file of the source, which is imported under a name of its own."""
    file, _, name = target.rpartition(":")
    if folder is None or not trust:
        raise InputError(f"network {target} is a program that would have to be run, {TRUST}")
    path = inside(folder, file)
    if not path.is_file():
        raise InputError(f"network {target}: there is no file {file} in {folder}")
    package = f"{PRIVATE}{abs(hash(str(path))):x}"
    try:
        with importing(folder):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path.parent)]  # for imports from beside the file
            spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's program raises
        raise InputError(f"network {target} cannot be imported ({first_line(error)})") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"network {target}: there is no class {name} in {file} that is a torch module")
    return found


@contextmanager
def importing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, a trusted source's own modules can be imported; afterwards none is left for the next source to meet.

    Bundles all have a package ``scripts``. Nothing is written into the folder.
    """
    own, before, bytecode = Path(folder).resolve(), dict(sys.modules), sys.dont_write_bytecode
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]
    sys.path.insert(0, str(own))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(str(own))
        sys.dont_write_bytecode = bytecode
        for name in set(sys.modules) - set(before):
            places = [getattr(sys.modules[name], "__file__", None), *getattr(sys.modules[name], "__path__", ())]
            its_own = any(Path(place).resolve().is_relative_to(own) for place in places if place)
            if its_own and not name.startswith(PRIVATE):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})
