"""Another person's network used like ours: its grid, its output, how it is adapted to a target, and bad cards."""

import inspect
import json
import logging
from typing import Any

import pytest
import torch
from bundle_runs import refused, toy_collection
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from medtl_ext.data.plan import Grid
from medtl_ext.metrics.features import tap_features
from medtl_ext.transfer import SegmentationTask
from medtl_ext.transfer.sources.allowed import transforms_of
from medtl_ext.transfer.sources.card import Card, channel_order, read_card
from medtl_ext.transfer.sources.network import (
    SourceNetwork,
    adapted,
    answering,
    meaning,
    untouched,
    warn_of_other_order,
    with_inputs,
    with_outputs,
)
from medtl_ext.transfer.sources.pool import Checkpoint, find_sources


class Net(nn.Module):
    """A network that sees one pixel and returns it in one of many forms."""

    def __init__(self, dims=2, into=1, out=2, end="", head="Conv"):
        super().__init__()
        self.first = getattr(nn, f"Conv{dims}d")(into, 4, 1)
        self.head = getattr(nn, f"{head}{dims}d")(4, out, 1)
        self.end = end

    def forward(self, image):
        found = self.head(self.first(image / 255 if self.end == "scaled" else image).relu())
        if self.end == "softmax":
            return found.softmax(1)
        if self.end == "sigmoid":
            return found.sigmoid()
        several = {"list": [2 * found, found], "dict": {"aux": 2 * found, "out": found}, "large": 100 * found}
        several |= {"pooled": nn.functional.adaptive_avg_pool2d(found, 1) if found.ndim == 4 else None}
        several |= {"fixed": nn.functional.avg_pool2d(found, 200) if self.end == "fixed" else None}
        several |= {"nan": found * torch.nan, "image": found.flatten(2).mean(2), "none": None, "scalar": found.mean()}
        return several.get(self.end, found)


@pytest.fixture
def make(tmp_path):
    """A card of `Net`, or of another network, with its weights in a file."""

    def write(weights=None, *, trust=True, end="", into=1, out=2, dims=2, head="Conv", **keys) -> Card:
        (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n{inspect.getsource(Net)}")
        arguments = {"dims": dims, "into": into, "out": out, "end": end, "head": head}
        torch.save(Net(**arguments).state_dict() if weights is None else weights, tmp_path / "net.pt")
        content = {"checkpoint": "net.pt", "network": {"_target_": "net.py:Net", **arguments}}
        (tmp_path / "net.json").write_text(json.dumps(content | keys))
        return read_card(tmp_path / "net.json", trust=trust)

    return write


def of(net: nn.Module, takes: int = 1, **keys: Any) -> SourceNetwork:
    return SourceNetwork(net, Card(**keys), channels=takes).eval()


@torch.no_grad()
def result(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return network(image)


def conv(dims: int = 2, into: int = 1, out: int = 2) -> nn.Module:
    return getattr(nn, f"Conv{dims}d")(into, out, 3, padding=1)


# Its grid


def test_a_2d_network_sees_a_volume_slice_by_slice():
    net, volume = conv(), torch.rand(2, 1, 7, 6, 11)
    alone = [result(net, volume[..., place]) for place in range(11)]
    torch.testing.assert_close(result(of(net), volume), torch.stack(alone, -1))
    torch.testing.assert_close(result(of(net), volume[..., 3]), alone[3])


@pytest.mark.parametrize(
    ("dims", "axes", "there", "back"),
    [
        (3, (2, 0, 1), "ncxyz->nczxy", None),
        (2, (1, 0), "ncxyz->nzcyx", "nzkyx->nkxyz"),
        (2, (1, 2, 0), "ncxyz->nyczx", "nykzx->nkxyz"),  # slices along y, in which z comes first
    ],
)
def test_axes_are_permuted_there_and_back(dims, axes, there, back):
    net, volume = conv(dims), torch.rand(2, 1, 4, 5, 6)
    turned = torch.einsum(there, volume)
    if back is None:
        expected = torch.einsum("nkzxy->nkxyz", result(net, turned))
    else:
        expected = torch.einsum(back, result(net, turned.flatten(0, 1)).unflatten(0, turned.shape[:2]))
    torch.testing.assert_close(result(of(net, axes=axes), volume), expected)


@pytest.mark.parametrize("blending", ["gaussian", "constant", "nnunet"])
@pytest.mark.parametrize("size", [(9, 13), (8, 4), (3, 13), (2, 3)])
def test_windows_cover_any_image(size, blending):
    net, image = Net(), torch.rand(3, 1, *size)
    torch.testing.assert_close(result(of(net, window=(8, 4), blending=blending), image), result(net, image))


def test_an_image_smaller_than_the_window_is_padded_with_zeros():
    net, image = conv(), torch.rand(1, 1, 4, 6)
    expected = result(net, nn.functional.pad(image, [1, 1, 2, 2]))[..., 2:-2, 1:-1]
    torch.testing.assert_close(result(of(net, window=(8, 8)), image), expected)


@pytest.mark.parametrize("window", [None, (6, 5)])
def test_mirrored_predictions_are_averaged(window):
    net, image = conv(), torch.rand(1, 1, 6, 5)
    flips = [[2], [3], [2, 3]]
    expected = (result(net, image) + sum(result(net, image.flip(axes)).flip(axes) for axes in flips)) / 4
    torch.testing.assert_close(result(of(net, mirror=(0, 1), window=window), image), expected)


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((7, 6), {}),
        ((7, 6), {"window": (5, 4)}),
        ((7, 6), {"window": (5, 4), "mirror": (0,), "blending": "nnunet"}),
        ((3, 9), {"window": (5, 4), "axes": (1, 0)}),
        ((5, 6, 11), {"window": (5, 4)}),
        ((5, 6, 4), {"axes": (1, 2, 0)}),
    ],
)
def test_features_line_up_with_the_image(shape, keys):
    net, image = Net(), torch.rand(2, 1, *shape)
    network = of(net, **keys)
    with tap_features(network, [None]) as tapped:
        result(network, image)
    pixels = nn.Conv3d(1, 4, 1) if len(shape) == 3 else net.first
    if len(shape) == 3:
        pixels.load_state_dict({"weight": net.first.weight[..., None], "bias": net.first.bias})
    torch.testing.assert_close(tapped[None][0], result(pixels, image).relu())


def test_a_coarse_layer_of_windows_lies_on_the_images_grid():
    net = nn.Sequential(nn.Conv2d(1, 3, 2, stride=2), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 1))
    network, image = of(net, window=(4, 4), layer="0"), torch.rand(1, 1, 8, 12)
    with tap_features(network, [None]) as tapped:
        result(network, image)
    torch.testing.assert_close(tapped[None][0], result(net[:2], image))


@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_programs_give_what_the_module_gives(kind, make, tmp_path):
    net, image = Net(), torch.rand(5, 1, 17, 12)
    size = {0: torch.export.Dim("n"), 2: torch.export.Dim("x"), 3: torch.export.Dim("y")}
    if kind == "ts":
        torch.jit.trace(net, image).save(tmp_path / "net.ts")
    else:
        torch.export.save(torch.export.export(net, (image,), dynamic_shapes=[size]), tmp_path / "net.pt2")
    keys = {"checkpoint": str(tmp_path / f"net.{kind}"), "window": (8, 8), "axes": (1, 0), "classes": 2}
    network = untouched(read_card(keys, trust=True), channels=1)
    torch.testing.assert_close(result(network, image), result(net, image))
    assert "program, which would run here" in refused(lambda: untouched(read_card(keys), channels=1))
    classes, how = ["background", "a", "b"], {"wanted": 1, "channels": ["T1"]}
    network = adapted(read_card(keys, trust=True), classes, **how).train()
    network(image).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    expected = network.net.layer(net(image))  # logits of three classes from those of two
    torch.testing.assert_close(result(network.eval(), image), expected.detach())
    (tmp_path / f"net.{kind}").write_bytes(b"no program")
    assert "cannot be read as a program" in refused(lambda: untouched(read_card(keys, trust=True), channels=1))


# Its output


def logit(*probabilities):
    return torch.tensor(probabilities).logit()


@pytest.mark.parametrize(
    ("output", "classes", "given", "expected"),
    [
        ("logits", 3, torch.tensor([0.2, 0.3, 0.5]).log() + 7, [0.2, 0.3, 0.5]),
        ("logits", None, torch.tensor([0.2, 0.3, 0.5]).log(), [0.2, 0.3, 0.5]),
        ("softmax", 3, torch.tensor([0.2, 0.3, 0.5]), [0.2, 0.3, 0.5]),
        ("softmax", 2, torch.tensor([0.0, 1.0]), [0, 1]),
        ("logits", 2, logit(0.7), [0.3, 0.7]),
        ("logits", None, logit(0.7), [0.3, 0.7]),
        ("sigmoid", 2, torch.tensor([0.7]), [0.3, 0.7]),
        ("sigmoid", 2, torch.tensor([1.0]), [0, 1]),
        # The second is written over the first: 0.4 * 0.5 neither, 0.6 * 0.5 the first alone.
        ("logits", 3, logit(0.6, 0.5), [0.2, 0.3, 0.5]),
        ("sigmoid", 3, torch.tensor([0.6, 0.5]), [0.2, 0.3, 0.5]),
        ("sigmoid", 4, torch.tensor([0.5, 0.5, 0.5]), [0.125, 0.125, 0.25, 0.5]),
        ("sigmoid", 2, torch.tensor([0.3, 0.6]), [1 / 3, 2 / 3]),  # a sigmoid of the background too
    ],
)
def test_probabilities_of_classes(output, classes, given, expected):
    network = of(nn.Identity(), len(given), output=output, classes=classes)
    found = network(given.view(1, -1, 1, 1)).softmax(1).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("output", ["logits", "softmax", "sigmoid"])
def test_half_precision_stays_finite(output):
    network = of(Net(end="" if output == "logits" else output), output=output, classes=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = result(network, 1e4 * torch.rand(1, 1, 8, 8))
    assert found.dtype == torch.float32
    assert found.isfinite().all()


# What is requested


def test_classes_are_asked_for_by_name_or_by_position():
    card = Card(classes=("Background", "WM", "GM", "CSF"))
    assert meaning(card, ["background", "gm"]) == [[0, 1, 3], [2]]
    assert meaning(card, ["background", "csf", "wm"]) == [[0, 2], [3], [1]]
    assert meaning(card, ["background", "a", "b", "c"]) == [[0], [1], [2], [3]]
    assert meaning(card, ["background", "lesion"]) is None
    assert meaning(Card(classes=3), ["background", "a", "b"]) == [[0], [1], [2]]


def test_classes_that_are_not_asked_for_are_background(make):
    card, image = make(out=4, classes=["background", "wm", "gm", "csf"]), torch.rand(1, 1, 4, 4)
    probabilities = result(untouched(card, channels=1), image).softmax(1)
    found = result(answering(card, ["background", "GM"], channels=1), image).softmax(1)
    torch.testing.assert_close(found[:, 1], probabilities[:, 2])
    torch.testing.assert_close(found[:, 0], 1 - probabilities[:, 2])
    message = refused(lambda: answering(card, ["background", "lesion"], channels=1))
    assert message == "it knows wm, gm, csf, but the target asks for lesion"


# Adapted to a target

CLASSES = ("background", "lesion", "edema")


@pytest.mark.parametrize("head", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    ("out", "asked", "rows"),
    [
        (3, ("Background", "Lesion", "Edema"), "kept"),
        (3, ("background", "edema"), [0, 2]),
        (3, ("background", "edema", "other", "lesion"), [0, 2, None, 1]),
        (2, ("background", "edema", "other"), [1, None]),  # sigmoids have none for the background
    ],
)
def test_the_head_is_kept_or_its_rows_are_copied_by_name(out, asked, rows, head, make):
    card, image = make(out=out, classes=list(CLASSES), head=head), torch.rand(1, 1, 4, 4)
    network = adapted(card, asked, wanted=1, channels=["T1"])
    own, new = untouched(card, channels=1).net.head, network.net.head
    assert result(network, image).shape == (1, len(asked), 4, 4)
    assert torch.equal(network.net.first.weight, untouched(card, channels=1).net.first.weight)
    if rows == "kept":
        rows = list(range(out))
    side = 1 if head == "ConvTranspose" else 0
    assert new.weight.shape[side] == len(rows)
    for place, row in enumerate(rows):
        if row is not None:
            assert torch.equal(new.weight.select(side, place), own.weight.select(side, row))
            assert new.bias[place] == own.bias[row]


@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_a_replaced_head_keeps_its_activation(end, make):
    card = make(out=3 - (end == "sigmoid"), end=end, output=end, classes=list(CLASSES))
    image = torch.rand(1, 1, 4, 4)
    network = adapted(card, ("background", "lesion"), wanted=1, channels=["T1"])
    assert network.card.output == end
    given = result(network.net.head, result(network.net.first, image).relu())
    expected = torch.cat([torch.zeros_like(given), given], 1) if end == "sigmoid" else given
    torch.testing.assert_close(result(network, image).softmax(1), expected.softmax(1))


def test_further_channels_keep_the_size_of_activations(make, caplog):
    caplog.set_level(logging.INFO)
    card, image = make(into=2, channels=["T1", "T2"], classes=2), torch.rand(1, 1, 4, 4)
    network = adapted(card, ["background", "x"], wanted=2, channels=["T1", "T2", "FLAIR"])
    before = result(untouched(card, channels=2), image.expand(1, 2, 4, 4))
    torch.testing.assert_close(result(network, image.expand(1, 3, 4, 4)), before)
    assert network.card.channels == ("T1", "T2", "FLAIR")
    assert "first for T1, T2, FLAIR: the first 2 copied, the others their mean, all scaled" in caplog.text


def test_a_fine_tuning_does_not_average_over_mirrored_images(make):
    card = make(classes=2, mirror=[0, 1])
    network = adapted(card, ["background", "x"], wanted=1, channels=["T1"])
    assert (network.card.mirror, network.flips) == ((), [])
    assert len(untouched(card, channels=1).flips) == 3


def test_fresh_has_none_of_the_weights(make):
    card = make(classes=2)
    used, fresh = (adapted(card, ["background", "x"], wanted=1, channels=["T1"], fresh=one) for one in (False, True))
    assert used.state_dict().keys() == fresh.state_dict().keys()
    assert not torch.equal(used.net.first.weight, fresh.net.first.weight)


@pytest.mark.parametrize("head", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("asked", [CLASSES, ("background", "edema"), (*CLASSES, "other")])
@pytest.mark.parametrize("channels", [("T1",), ("T1", "T2", "FLAIR")])
@pytest.mark.parametrize("out", [3, 2])
def test_a_fine_tuning_is_a_source(out, channels, asked, head, make, tmp_path):
    card = make(out=out, classes=list(CLASSES), channels=["T1"], window=[8, 8], mirror=[1], axes=[1, 0], head=head)
    network = adapted(card, asked, wanted=1, channels=channels)
    (tmp_path / "run").mkdir()
    network.write_card(tmp_path / "run")
    torch.save(network.state_dict(), tmp_path / "run" / "model.pt")
    again = read_card(tmp_path / "run" / "model.json", trust=True)
    assert again.class_names == (CLASSES if asked == CLASSES else asked)
    image = torch.rand(1, len(channels), 9, 10)
    found = result(untouched(again, channels=len(channels)), image)
    torch.testing.assert_close(found, result(network.eval(), image))


def test_weights_of_another_width_are_not_fitted(make):
    wider = Net()
    wider.first, wider.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)
    message = refused(lambda: untouched(make(wider.state_dict(), classes=2), channels=1))
    assert "does not fit this Net: 1 of 4 tensors copied, 3 of another shape" in message


def test_a_network_that_scales_its_images_gets_further_channels(make):
    card = make(end="scaled", classes=2)
    network = adapted(card, ["background", "x"], wanted=1, channels=["T1", "T2"])
    image = torch.rand(1, 1, 4, 4)
    expected = result(untouched(card, channels=1), image)
    torch.testing.assert_close(result(network, image.expand(1, 2, 4, 4)), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d, (1, 4, 6, 6)), (nn.Conv3d, (1, 4, 3, 3, 3)), (nn.ConvTranspose2d, (1, 4, 6, 6)), (nn.Linear, (1, 4))],
)
def test_outputs_are_copied(layer, shape, bias):
    size = [] if layer is nn.Linear else [3]
    how = {"stride": 2, "output_padding": 1} if layer is nn.ConvTranspose2d else {}
    layer, data = layer(4, 3, *size, bias=bias, **how), torch.rand(shape)
    new = with_outputs(layer, [2, None, 0, None])
    found, before = result(new, data), result(layer, data)
    assert (new.bias is None) == (layer.bias is None)
    torch.testing.assert_close(found[:, [0, 2]], before[:, [2, 0]])
    assert not torch.equal(found[:, 1], before[:, 1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_inputs_keep_activations(kind, n, bias):
    layer, image = kind(2, 3, 3, stride=2, padding=1, bias=bias), torch.rand(1, 1, 8, 8)
    new = with_inputs(layer, n)
    assert (new.bias is None) == (layer.bias is None)
    found = result(new, image.expand(1, n, 8, 8))
    torch.testing.assert_close(found, result(layer, image.expand(1, 2, 8, 8)))


def test_grouped_layers_are_refused():
    for change in (lambda layer: with_inputs(layer, 6), lambda layer: with_outputs(layer, [0])):
        message = refused(lambda change=change: change(nn.Conv2d(4, 4, 1, groups=2)))
        assert "grouped convolution, whose channels cannot be changed" in message


# Channels


@pytest.mark.parametrize(
    ("wanted", "given", "fill", "expected"),
    [
        (["T1"], ["T1"], None, ([0], [])),
        (["flair", "t1"], ["T1", "T2", "FLAIR"], None, ([2, 0], [1])),
        (["a", "b"], ["T1", "T2"], None, ([0, 1], [])),
        (None, ["T1", "T2"], None, ([0, 1], [])),
        (["T1", "T2"], ["T2"], "mean", ([None, 0], [])),
    ],
)
def test_channels_are_found(wanted, given, fill, expected):
    assert channel_order(wanted, given, fill=fill) == expected


@pytest.mark.parametrize(
    ("wanted", "given", "fill", "message"),
    [
        (
            ["T1", "T2"],
            ["T1"],
            None,
            "it takes channels T1, T2, but the target's images have T1: T2 is missing; "
            '"fill": "mean" in its card makes it a constant',
        ),
        (["CT"], ["T1", "T2"], None, "it takes channel CT, but the target's images have T1, T2: CT is missing"),
        (["CT"], ["T1", "T2"], "mean", "it takes channel CT, but the target's images have T1, T2: CT is missing"),
    ],
)
def test_channels_that_are_missing(wanted, given, fill, message):
    assert refused(lambda: channel_order(wanted, given, fill=fill)) == message


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_another_order_of_channels_is_warned_of(order, caplog):
    label = (torch.rand(1, 16, 16) > 0.5).float()
    image = torch.cat([label, torch.rand(1, 16, 16)])[order]
    net = nn.Conv2d(2, 2, 1)
    net.weight.data, net.bias.data = torch.tensor([[0.0, 0.0], [9.0, 0.0]])[..., None, None], torch.tensor([0, -4.5])
    network = SourceNetwork(net, Card(channels=("T1", "T2"), classes=2, name="theirs"), channels=2)
    warn_of_other_order(network, [{"image": image, "label": label}])
    warned = "source theirs explains the labels far better with the channels in the order T2, T1" in caplog.text
    assert warned == (order == [1, 0])
    warn_of_other_order(of(conv(), classes=2), [{"image": image[:1], "label": label}])  # nothing to permute


# Bad cards


def deep(depth: int = 100_000) -> str:
    return '{"network": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (deep(), "is JSON that is nested too deeply"),
        (deep(600), "Invalid JSON: recursion limit exceeded"),
        ("[]", "must hold an object of JSON; found a list"),
        ('{"chanels": ["R"]}', "key 'chanels' is unknown; did you mean 'channels'?"),
        ('{"trusted": true}', "key 'trusted' is unknown"),
        ('{"output": "probabilities"}', "output must be 'logits', 'softmax' or 'sigmoid'; found 'probabilities'"),
        ('{"classes": []}', "classes"),
        ('{"overlap": 1}', "overlap must be less than 1; found 1"),
        ('{"axes": [0, 0, 1]}', "axes must name spatial axes, each once"),
        ('{"mirror": [1, 1]}', "mirror must name spatial axes, each once"),
        ('{"window": [0, 8]}', "window must be two or three sizes in voxels; found [0, 8]"),
        ('{"channels": ["R", "R"]}', "channels must have different names"),
        ('{"name": "../../elsewhere"}', "name '../../elsewhere' cannot be part of a file's name"),
        ('{"name": "=x"}', "name"),
        ('{"name": "a\\\\b"}', "name"),
        ('{"name": ".."}', "name"),
    ],
)
def test_cards_that_are_none(text, message, tmp_path):
    file = tmp_path / "card.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = refused(lambda: read_card(file))
    assert message in found
    assert len(found) < 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end": "list"}, 'its network gives a list; pick one in its card ("pick"): 0, 1'),
        ({"end": "dict"}, "its network gives a dict; pick one in its card (\"pick\"): 'aux', 'out'"),
        ({"end": "list", "pick": 2}, "its network gives no output 2"),
        ({"end": "list", "pick": "out"}, "its network gives no output 'out'"),
        ({"end": "dict", "pick": "outt"}, "its network gives no output 'outt'"),
        ({"end": "none"}, "its network gives a NoneType"),
        ({"end": "scalar"}, "does not give one prediction per pixel"),
        ({"end": "image"}, "does not give one prediction per pixel"),
        ({"classes": 5}, "its network gives 2 channels, but its card names 5 classes"),
        ({"classes": ["only"]}, "its network gives 2 channels, but its card names 1 classes"),
        ({"out": 2, "end": "softmax", "output": "softmax", "classes": 3}, "its network gives 2 channels, but its card"),
        ({"end": "sigmoid", "output": "softmax"}, "its card says softmax, but its output does not add up to 1"),
        ({"end": "large", "output": "sigmoid"}, "its card says sigmoid, but its output is from"),
        ({"end": "large", "output": "softmax"}, "its card says softmax, but its output is from"),
        ({"end": "nan"}, "its network gives NaN or Inf"),
        ({"into": 3}, "its network refuses images of 1 x 224 x 224"),
        ({"mirror": [2]}, "gives a 2D network axes [0, 1] and mirror [2], which do not fit; correct one"),
        ({"dims": 3, "axes": [1, 0]}, "gives a 3D network axes [1, 0] and mirror [], which do not fit; correct one"),
        ({"trust": False}, "net.py:Net is code that would have to run, which needs --trust_sources true"),
        ({"weights": nn.Conv2d(1, 2, 1).state_dict()}, "does not fit this Net: 0 of 4 tensors copied"),
        ({"weights": Net(dims=3).state_dict()}, "does not fit this Net"),
        ({"weights": {"first.weight": torch.full((4, 1, 1, 1), torch.nan)}}, "its weights hold NaN or Inf (first.w"),
        ({"weights": {"first.weight": "text"}}, "holds no network weights"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"checkpoint": None}, "it has no weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_networks_that_are_not_what_their_card_says(given, message, make):
    assert message in refused(lambda: untouched(make(**given), channels=1))


@pytest.mark.parametrize(("end", "pick", "times"), [("list", 1, 1), ("list", 0, 2), ("dict", "out", 1), ("", 1, 1)])
def test_one_output_is_picked(end, pick, times, make):
    network, image = untouched(make(end=end, pick=pick), channels=1), torch.rand(2, 1, 4, 4)
    expected = times * result(network.net.head, result(network.net.first, image).relu())
    torch.testing.assert_close(result(network, image), expected)


@pytest.mark.parametrize("end", ["image", "pooled", "fixed"])
def test_one_answer_an_image(end, make):
    network, images = untouched(make(end=end, classes=2), channels=1, per_pixel=False), torch.rand(3, 1, 224, 224)
    assert result(network, images).shape == (3, 2)
    fitted = adapted(network.card, ["a", "b", "c"], wanted=1, channels=["x"], per_pixel=False)
    assert result(fitted, images).shape == (3, 3)


def test_an_empty_field_of_view_is_named():
    steps = Compose(transforms_of([{"_target_": "CropForegroundd"}], ["image"]))
    image = steps({"image": MetaTensor(torch.zeros(1, 4, 4, 4))})["image"]
    message = "the preprocessing of the source's card cropped an image to nothing: is the image empty?"
    assert message in refused(lambda: of(conv(3), classes=2)(image[None]))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"preprocessing": [{"_target_": "RandFlipd"}]}, "preprocessing RandFlipd is not on the list"),
        ({"preprocessing": [{"_target_": "Flipd", "axis": 0}]}, "got an unexpected keyword argument 'axis'"),
        ({"network": {"_target_": "os.system"}}, "os.system is not on the list"),
        ({"channels": ["CT", "PET"]}, "CT, PET are missing"),
        ({"dims": 3, "trust": False}, "would have to run"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_left_out_before_anything_runs(keys, reason, make, tmp_path):
    make(**keys)
    where = str(toy_collection(tmp_path / "toy"))
    target = SegmentationTask("A-T2-ED", collection=where)
    given = {"collection": where, "trust": keys.get("trust", True)}
    (found,) = find_sources([str(tmp_path / "net.json")], target, **given)
    assert reason in found.left_out


def test_a_network_whose_own_parts_are_called_net_keeps_its_names(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\nclass Theirs(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = nn.Conv2d(1, 2, 1)\n"
        "    def forward(self, image):\n        return self.net(image)\n"
    )
    net = torch.nn.Sequential()
    net.net = torch.nn.Conv2d(1, 2, 1)
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    content = {"checkpoint": str(tmp_path / "theirs.pt"), "network": {"_target_": "theirs.py:Theirs"}, "classes": 2}
    network = untouched(read_card(content, trust=True, folder=tmp_path), channels=1)
    torch.testing.assert_close(network.net.net.weight, net.net.weight)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    network.write_card(tmp_path)
    again = untouched(read_card(tmp_path / "model.json", trust=True), channels=1)
    torch.testing.assert_close(again.net.net.weight, net.net.weight)


def test_inference_gives_a_network_its_channels_on_the_grid_of_its_training(tmp_path):
    torch.save(torch.nn.Conv2d(1, 2, 1).state_dict(), tmp_path / "one.pt")
    definition = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    card = {"checkpoint": "one.pt", "network": definition, "channels": ["FLAIR"], "classes": 2}
    (tmp_path / "one.json").write_text(json.dumps(card))
    Grid((1, 1, 3), (32, 32)).write(tmp_path / "grid.json")
    found = Checkpoint(path=str(tmp_path / "one.pt"), channels=["T1", "FLAIR"])
    assert found.network(torch.nn.Identity())(torch.rand(1, 2, 8, 8)).shape == (1, 2, 8, 8)
    assert found.grid(spacing="auto", roi_size="auto").spacing == [1, 1, 3]
