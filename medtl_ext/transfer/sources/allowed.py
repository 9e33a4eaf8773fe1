"""Build networks and transforms of untrusted cards and bundles: only what ``allowed.json`` lists is ever built.

Definitions look like MONAI's (``_target_`` and arguments), but nothing in them is evaluated. A target must be on the
list, and its arguments must be plain values. Downloads are switched off, since a source brings its own weights.
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

from medtl_ext._validation import InputError, first_line, shown
from medtl_ext.transforms import EachKeyd

#: The lists of ``allowed.json``.
ALLOWED: dict[str, Any] = json.loads(Path(__file__).with_name("allowed.json").read_text(encoding="utf-8"))
TRUST = "which needs --trust_sources true"
MOST_BYTES = 2**24  # of a config
MOST_PARAMETERS = 10**9  # a larger network is a mistake or an attack: it would not fit into memory
LARGEST_NUMBER = 10**6  # in a network's arguments, for the same reason
PAD_ARGUMENTS = ("value", "constant_values")  # the allowed **kwargs of padding transforms
PRIVATE = "_medtl_source_"


def inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Resolve a path relative to a folder, symbolic links included, and refuse it if it is outside the folder.

    Raises:
        InputError: the path leaves the folder, by ``..``, as an absolute path or through a symbolic link.

    >>> inside("/data/zoo", "../../etc/passwd")
    Traceback (most recent call last):
    medtl_ext._validation.InputError: ../../etc/passwd is outside the source's folder, so it is not read
    """
    found = (Path(folder) / path).resolve()
    if not found.is_relative_to(Path(folder).resolve()):
        raise InputError(f"{path} is outside the source's folder, so it is not read")
    return found


def read_mapping(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read a JSON or YAML file in a source's folder.

    Raises:
        InputError: the file is missing, outside the folder, too large or damaged, or holds no mapping.
    """
    path = inside(folder, name)
    if not path.is_file():
        raise InputError(f"its {name} does not exist")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"its {name} is larger than {MOST_BYTES} bytes")
    try:
        content = ConfigParser.load_config_file(path)
    except Exception as error:  # the two parsers raise many kinds of errors
        raise InputError(f"its {name} is no JSON or YAML ({type(error).__name__}: {first_line(error):.100})") from error
    if not isinstance(content, dict):
        raise InputError(f"its {name} holds no mapping of keys to values")
    return content


def built_network(
    definition: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, trust: bool = False
) -> nn.Module:
    """Build a fresh network from a definition, without evaluating or downloading anything.

    Args:
        definition: ``_target_`` and plain arguments. The target is a class of the packages in `ALLOWED` (a name without
            dots is one of ``monai.networks.nets``), ``timm.create_model``, or ``file.py:Class`` in ``folder``.
        folder: the folder of the source.
        trust: code in the source's files may run.

    Raises:
        InputError: the target is not on the list; an argument is unknown or an expression, or needs something that is
            not on the list; a package is not installed; or the network cannot be built.

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
    except Exception as error:  # a network may raise any error for bad arguments
        raise InputError(f"{where} cannot be built from its arguments ({first_line(error)})") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{where} gives a {type(network).__name__}, not a network")
    return network


def checked_network(
    definition: Mapping[str, Any], folder: str | os.PathLike[str] | None = None, trust: bool = False
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or function that builds a network, and its checked arguments; see `built_network`."""
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
            raise InputError(f"{where}: {key} {arguments[key]!r} is no plain name (an address would be downloaded)")
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
    """Build the preprocessing of a card from MONAI's dictionary transforms; only those on the list are allowed.

    Spatial transforms act on every key; on all but the first key they use nearest neighbour and pad with zeros.
    Intensity transforms act on the first key only: on all its channels, or on those of our argument ``channels``
    (numbers from 0). Loading, channels first, types and devices are left out, because the bundles do them.

    Args:
        preprocessing: definitions with ``_target_`` and plain arguments, without ``keys``.
        keys: key of the image, then keys of labels.

    Raises:
        InputError: a transform is not on the list, or an argument is unknown or no plain value.

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
            raise InputError(f"{where} has the argument {key}, which is set elsewhere; leave it out")
    channels = given.pop("channels", None) if kind == "intensity" else None

    def made(names: Sequence[str], **changed: Any) -> MapTransform:
        arguments = given | changed | {"keys": list(names)}
        _check_arguments(where, factory, arguments)
        try:
            return factory(**arguments)
        except Exception as error:  # MONAI may raise any error for bad arguments
            raise InputError(f"{where} cannot be built from its arguments ({first_line(error)})") from error

    if kind == "foreground":  # all keys are cropped to the box of the image
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
    """Interpolation of labels; when resizing, torch's "nearest" would shift them half a voxel against the image."""
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
            raise InputError(f"a transform is for channels {self.channels}, but the image has {len(image)}")
        image[self.channels] = self.transform({key: image[self.channels]})[key].to(image.dtype)
        return image


def kind_of_transform(target: Any) -> str | None:
    """The name of the list in `ALLOWED` that contains a transform; None: it is not allowed.

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
    """MONAI's main name of a transform, which also has aliases that end in D and Dict."""
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
    """The value, if it is plain JSON without expressions or references."""
    if isinstance(value, str):
        if value.lstrip()[:1] in tuple("$@%"):
            raise InputError(f"{where}: {value!r:.200} is an expression or reference; give a plain value")
        return value
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return {str(key): _plain(where, one, build, most) for key, one in value.items()}
        if build is None:
            raise InputError(f"{where}: {value['_target_']!r:.200} would have to be built; give plain values only")
        return build(value)
    if isinstance(value, list | tuple):
        return [_plain(where, one, build, most) for one in value]
    if value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{where}: {value!r:.200} is no plain value")
    if value is not None and (value != value or abs(value) > most):
        raise InputError(f"{where}: {value!r:.20} is too large or no number")
    return value


def _check_arguments(where: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse unknown arguments, and text for an argument that the transform would call as a function."""
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: {first_line(error)}") from error
    if not (isinstance(factory, type) and issubclass(factory, MapTransform)):
        return
    for key, value in arguments.items():
        parameter = signature.parameters.get(key)
        if parameter is None and key not in ("keys", *PAD_ARGUMENTS):
            raise InputError(f"{where}: got an unexpected keyword argument {shown.repr(key)}")
        if "Callable" in str(getattr(parameter, "annotation", "")) and isinstance(value, str):
            raise InputError(f"{where}: {key} is a function, which a card cannot give; leave it out")


def _listed(target: str) -> Callable[..., Any]:
    """Import the class or function of a name that is on the list."""
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
    """Refuse a network with too many parameters; they are counted on torch's "meta" device, which uses no memory."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in factory(**arguments).parameters())
    except Exception:  # some networks cannot be built on this device; other faults are reported by the real build
        return
    if size > MOST_PARAMETERS:
        raise InputError(f"{where} would have {size:.1e} parameters; at most {MOST_PARAMETERS:.0e} are allowed")


def _of_file(target: str, folder: str | os.PathLike[str] | None, trust: bool) -> Callable[..., Any]:
    """A class in a file of the source; the file is imported under a private name."""
    file, _, name = target.rpartition(":")
    if folder is None or not trust:
        raise InputError(f"network {target} is code that would have to run, {TRUST}")
    path = inside(folder, file)
    if not path.is_file():
        raise InputError(f"network {target}: there is no file {file} in {folder}")
    package = f"{PRIVATE}{abs(hash(str(path))):x}"
    try:
        with importing(folder):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path.parent)]  # for imports of files in the same folder
            spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:  # the code may raise any error
        raise InputError(f"network {target} cannot be imported ({first_line(error)})") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"network {target}: there is no class {name} in {file} that is a torch module")
    return found


@contextmanager
def importing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block, the modules of a trusted source can be imported; afterwards they are removed again.

    Otherwise the package ``scripts`` of one bundle would be found by the next. Nothing is written into the folder.
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
