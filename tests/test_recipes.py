"""Recipes of fine-tuning: each does what it says, continues after an interruption, and the next overlay undoes it."""

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from bundle_runs import OF_SEEDS, RECIPES, RISK_MAP, card_of_a_unet, read_json, refused, trainings
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.networks.nets import UNETR, BasicUNet, DynUNet, UNet
from torch import nn

from medtl_ext.engines import WeightedTrainer
from medtl_ext.handlers import (
    CachedFeatures,
    FeatureDistillation,
    LayerwiseRates,
    LinearProbe,
    ResumableCheckpoint,
    SpectralShrinkage,
    StartingPoint,
    WeightAveraging,
    WeightInterpolation,
)
from medtl_ext.networks import (
    Ensemble,
    adapt_batch_norm,
    all_but,
    freeze,
    holding,
    layers,
    low_rank,
    soup,
    spatial_adapter,
)
from medtl_ext.transfer.config import identity

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")
TRAINED = [name for name in RECIPES if name != "adabn"]
IMAGE = torch.rand(1, 16, 16)
FEATURES = [4, 4, 8, 8, 8, 4]


def unet():
    return BasicUNet(2, 1, 2, features=FEATURES, act="relu", norm="batch", upsample="deconv")


def weights_of(path):
    return torch.load(path, weights_only=True)


def moved(before, after):
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


# What the overlays say


@pytest.mark.parametrize("recipe", TRAINED)
def test_the_next_overlay_undoes_a_recipe(recipe):
    """An audit adds the overlays of its arms to the run that it belongs to."""
    alone, after = RISK_MAP.workflow("full"), RISK_MAP.workflow(recipe, "full")
    assert identity(after.parser.get()) == identity(alone.parser.get())
    assert identity(RISK_MAP.workflow(recipe).parser.get()) != identity(alone.parser.get())


@pytest.fixture
def options(options, tmp_path):
    torch.save(unet().state_dict(), tmp_path / "source.pt")
    return (
        options
        | {"network_def#features": FEATURES, "train_slices": 4}
        | {"source": {"task": "14-FLAIR-ED", "checkpoint": str(tmp_path / "source.pt")}}
    )


def train(recipe, folder, options, dies_at=None):
    folder.mkdir(exist_ok=True)
    workflow = RISK_MAP.workflow(recipe, **options | {"output_dir": str(folder), "epochs": 3, "val_interval": 3})
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")

    def die(engine):
        if engine.state.epoch == dies_at:
            raise KeyboardInterrupt

    trainer.add_event_handler(Events.EPOCH_STARTED, die)
    with pytest.raises(KeyboardInterrupt) if dies_at else nullcontext():
        trainer.run()
    return folder


@pytest.mark.parametrize("recipe", ["warmup", "discriminative", "lp_ft", "ema", "joint"])
def test_an_interrupted_recipe_gives_what_it_gives_in_one_go(recipe, options, tmp_path):
    whole = train(recipe, tmp_path / "whole", options)
    train(recipe, tmp_path / "parts", options, dies_at=3)
    parts = train(recipe, tmp_path / "parts", options)
    one, other = (weights_of(folder / "last.pt")["network"] for folder in (whole, parts))
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert moved(weights_of(tmp_path / "source.pt"), one) == set(one)
    best, again = (weights_of(folder / "model.pt") for folder in (whole, parts))
    torch.testing.assert_close(again, best, rtol=0, atol=0)
    assert (moved(one, best) != set()) == (recipe == "ema")


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        ("surgical_first", r"(conv_0|final_conv)\."),
        ("surgical_last", r"(upcat_2\.convs|upcat_1|final_conv)\."),
        ("affine", r".*\.adn\.N\.|final_conv\."),
        ("lp_ft", ""),
    ],
)
def test_a_recipe_trains_the_part_that_it_says(recipe, trained, options):
    network = RISK_MAP.workflow(recipe, **options).parser.get_parsed_content("network")
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == bool(re.match(trained, name)), name


@pytest.mark.parametrize(("recipe", "dimensions"), [("surgical_first", 3), ("lp_ft", 2), ("adabn", 2)])
def test_a_recipe_takes_somebody_elses_network(recipe, dimensions, options, tmp_path):
    source = card_of_a_unet(tmp_path, dimensions, ["background", "ED"], norm="batch")
    given = options | {"source": source, "batch_size": 2}
    RISK_MAP.run(recipe, **{key: value for key, value in given.items() if key != "epochs" or recipe != "adabn"})
    before, after = weights_of(tmp_path / "theirs.pt"), weights_of(Path(options["output_dir"]) / "model.pt")
    trained = moved(before, {name.removeprefix("net."): value for name, value in after.items()})
    if recipe == "surgical_first":
        assert {name.split(".")[1] for name in trained} == {"0", "2"}
    elif recipe == "adabn":
        assert {name.rpartition(".")[2] for name in trained} == {"running_mean", "running_var", "num_batches_tracked"}
    else:
        assert trained == set(before)


def test_joint_training_sees_as_many_slices_of_the_source_with_the_classes_of_its_own_task(options):
    given = options | {"target_task": "17-T2-ED", "source": {**options["source"], "task": "14-T2-ET"}}
    parser = RISK_MAP.workflow("joint", **given).parser
    dataset = parser.get_parsed_content("train#trainer").data_loader.dataset
    assert [item["subject"][:2] for item in dataset] == ["17"] * 4 + ["14"] * 4
    origin = parser.get_parsed_content("origin")
    (selected,) = (
        step for step in origin.relabelled(parser.get_parsed_content("train#steps")) if hasattr(step, "values")
    )
    assert selected.values == [(2,)]
    assert (origin.target.label_values, origin.task.label_values) == ([[1]], [[2]])
    for wrong, said in [
        ({"source": options["source"]["checkpoint"]}, "give --source a task"),
        ({"target_task": "17-T2-FeTS"}, "14-T2-ET has 2 classes, the target 4"),
    ]:
        parser = RISK_MAP.workflow("joint", **given | wrong).parser
        assert said in refused(lambda parser=parser: parser.get_parsed_content("origin").task)


# Layers, in the order in which they run


class Backwards(nn.Module):
    """Its layers are named and listed in another order than they run; one never runs."""

    def __init__(self):
        super().__init__()
        self.a_head, self.b_unused, self.c_first = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(1, 2, 1)
        self.d_norm, self.e_middle = nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 1)

    def forward(self, image):
        return self.a_head(self.e_middle(self.d_norm(self.c_first(image))))


@pytest.mark.parametrize(
    ("network", "first", "last"),
    [
        (unet(), "conv_0.conv_0", "final_conv"),
        (UNet(2, 1, 2, channels=[4, 8, 8], strides=[2, 2]), "model.0", "model.2"),
        (
            DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 8], deep_supervision=True),
            "input_block.conv1",
            "output_block",
        ),
        (Backwards(), "c_first", "a_head"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_stand_in_the_order_in_which_they_run(network, first, last):
    before, found = copy.deepcopy(network.state_dict()), layers(network, IMAGE)
    assert found[0][0].startswith(first)
    assert found[-1][0].startswith(last)
    named = [name for names in found for name in names]
    assert len(named) == len(set(named))
    assert {name.rpartition(".")[0] for name, _ in network.named_parameters()} <= set(named)
    assert not moved(before, network.state_dict())  # no statistics either
    assert network.training


def test_a_part_is_trained_with_its_statistics_and_the_rest_not():
    network = freeze(Backwards(), all_but(IMAGE, first=0.1))
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == {
        *("c_first.weight", "c_first.bias", "b_unused.weight", "b_unused.bias", "a_head.weight", "a_head.bias")
    }
    for shares, kept in [({"first": 0.1}, False), ({"last": 0.1}, True)]:
        network = freeze(Backwards(), all_but(IMAGE, **shares))
        network.train()(torch.rand(2, 1, 8, 8))
        assert bool((network.d_norm.running_mean == 0).all()) == kept


def test_a_network_without_layers_to_tell_apart_says_so():
    assert "the layers of this Conv2d cannot be found" in refused(lambda: layers(nn.Conv2d(1, 2, 1), IMAGE))


# What the handlers do


def trainer_of(network, *handlers, epochs=4, optimizer=None):
    torch.manual_seed(0)
    data = [{"image": torch.rand(1, 16, 16), "label": torch.rand(1, 16, 16).round()} for _ in range(4)]
    return WeightedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=2),
        network=network,
        optimizer=optimizer or torch.optim.Adam(network.parameters(), lr=0.01),
        loss_function=lambda logits, label: nn.functional.cross_entropy(logits, label[:, 0].long()),
        train_handlers=list(handlers),
    )


def test_a_probe_trains_the_head_and_then_everything():
    network, after = unet(), [copy.deepcopy((state := unet()).state_dict())]
    network.load_state_dict(state.state_dict())
    trainer = trainer_of(network, LinearProbe(network=network, image=IMAGE, share=0.5))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: after.append(copy.deepcopy(network.state_dict())))
    trainer.run()
    head = {"final_conv.weight", "final_conv.bias"}
    assert [moved(*pair) for pair in pairwise(after[:3])] == [head, head]
    assert moved(after[2], after[3]) == set(after[0])


def test_rates_fall_by_one_factor_from_the_head_to_the_image():
    network = unet()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, weight_decay=0.1)
    trainer_of(network, LayerwiseRates(network=network, optimizer=optimizer, image=IMAGE), optimizer=optimizer)
    rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
    assert (rates[0], rates[-1]) == (pytest.approx(0.001), pytest.approx(0.01))
    torch.testing.assert_close(rates[1:] / rates[:-1], torch.full((len(rates) - 1,), 10 ** (1 / (len(rates) - 1))))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


@pytest.mark.parametrize(("decay", "start"), [(0.5, 0.0), (None, 0.5)])
def test_the_average_of_the_weights_is_what_is_validated(decay, start):
    network, seen = unet(), []
    evaluator = SupervisedEvaluator(device=torch.device("cpu"), val_data_loader=[], network=network, epoch_length=1)
    trainer = trainer_of(network, WeightAveraging(network=network, evaluator=evaluator, decay=decay, start=start))
    norm = network.conv_0.conv_0.adn.N
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(norm.running_mean.clone()))
    trainer.run()
    expected = seen[0]
    for value in seen[1:]:
        expected = decay * expected + (1 - decay) * value if decay else torch.stack(seen[-5:]).mean(0)
    assert len(seen) == 8
    torch.testing.assert_close(evaluator.network.conv_0.conv_0.adn.N.running_mean, expected)
    assert moved(network.state_dict(), evaluator.network.state_dict())


def test_weights_are_pulled_towards_the_start_and_the_head_towards_zero():
    network, losses = unet(), []
    start = copy.deepcopy(dict(network.named_parameters()))
    plain = trainer_of(copy.deepcopy(network), epochs=1)
    pulled = trainer_of(network, StartingPoint(network=network, image=IMAGE, strength=3), epochs=1)
    for one in (plain, pulled):
        one.add_event_handler(Events.ITERATION_COMPLETED, lambda one: losses.append(one.state.output[0]["loss"]))
        torch.manual_seed(1)
        one.run()
    head = sum(float(value.detach().square().sum()) for name, value in start.items() if name.startswith("final_conv"))
    assert losses[2] - losses[0] == pytest.approx(1.5 * head, rel=1e-4)  # in the first step the rest is the start
    far, near = (
        sum(float((value - start[name]).square().sum()) for name, value in one.network.named_parameters())
        for one in (plain, pulled)
    )
    assert near < far


def features(network, images):
    """The input of the head of `unet`, computed again."""
    seen = []
    handle = network.final_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(images)
    handle.remove()
    return seen[0]


def smallest_singular_value(network, untouched, images):
    rows = features(network, images).movedim(1, -1).flatten(0, -2)
    return torch.linalg.svdvals(rows)[-1] ** 2 / len(rows)


def distance_of_features(network, untouched, images):
    one, other = features(network, images), features(untouched.eval(), images)
    return ((one - other) ** 2).sum(1).mean()


@pytest.mark.parametrize(
    ("recipe", "measure"),
    [(SpectralShrinkage, smallest_singular_value), (FeatureDistillation, distance_of_features)],
)
def test_a_penalty_on_features_is_what_it_says_and_makes_them_smaller(recipe, measure):
    network, found, losses = unet(), [], []
    for strength in (0, 3):
        one, images = copy.deepcopy(network), []
        trainer = trainer_of(one, recipe(network=one, image=IMAGE, strength=strength), epochs=20)

        def note(engine, images=images):
            losses.append(float(engine.state.output[0]["loss"]))
            images.append(torch.stack([item["image"] for item in engine.state.batch]))

        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        trainer.run()
        with torch.no_grad():
            before, after = (
                measure(copy.deepcopy(n).train(), copy.deepcopy(network), images[0]) for n in (network, one)
            )
        found.append(after)
    assert losses[40] - losses[0] == pytest.approx(3 * float(before), rel=1e-3)
    assert found[1] < found[0] / 2


def test_the_point_on_the_way_that_validation_likes_is_kept_also_after_an_interruption(tmp_path):
    """Killed during the search and again after it, the run finds the same point: halfway."""
    network, state = unet(), SimpleNamespace(epoch=1, metrics={"dice": 0.5}, key_metric_name="dice")
    start, scores = copy.deepcopy(network.state_dict()), iter([0.6, KeyboardInterrupt, *[0.6, 0.7, 0.8, 0.8, 0.1] * 2])

    def validate():
        if (score := next(scores)) is KeyboardInterrupt:
            raise score
        state.metrics = {"dice": score}

    evaluator = SimpleNamespace(network=network, state=state, run=validate)
    for attempt in range(3):
        network.load_state_dict(start)
        recipe = WeightInterpolation(network=network, evaluator=evaluator, save_dir=tmp_path)
        checkpoint = ResumableCheckpoint(save_dir=tmp_path, evaluator=evaluator, save_dict={"network": network})
        with nullcontext() if attempt else pytest.raises(KeyboardInterrupt):
            trainer_of(network, recipe, checkpoint, epochs=1).run()
    end, kept = (weights_of(tmp_path / f"{name}.pt") for name in ("finetuned", "model"))
    for name, value in end.items():
        if value.is_floating_point():
            torch.testing.assert_close(kept[name], (start[name] + value) / 2)
    table = pd.read_csv(tmp_path / "interpolation.csv")
    assert dict(zip(table["coefficient"], table["dice"], strict=True))[0.5] == 0.8


def test_batch_norm_gets_the_statistics_of_the_target_and_weights_stay(caplog):
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1))
    before, batches = copy.deepcopy(network.state_dict()), [{"image": torch.rand(3, 1, 4, 4) + 5} for _ in range(2)]
    adapt_batch_norm(network, batches, "cpu")
    assert moved(before, network.state_dict()) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    expected = torch.cat([batch["image"] for batch in batches]).mean()
    torch.testing.assert_close(network[0].running_mean, expected[None])
    adapt_batch_norm(nn.Conv2d(1, 2, 1), batches, "cpu")
    assert "no batch norm" in caplog.text


# What is put into a network


def test_lora_trains_linear_layers_and_the_head_and_leaves_plain_weights(options, tmp_path):
    assert "this BasicUNet has none" in refused(lambda: freeze(unet(), low_rank(IMAGE)))
    pytest.importorskip("peft")
    pytest.importorskip("einops")  # of MONAI's UNETR
    shape = {"img_size": [32, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 16, "num_heads": 2}
    network = UNETR(1, 2, spatial_dims=2, **shape)
    torch.save(network.state_dict(), tmp_path / "source.pt")
    definition = {"_target_": "UNETR", "in_channels": 1, "out_channels": 2, "spatial_dims": 2, **shape}
    given = {name: value for name, value in options.items() if not name.startswith("network_def")}
    given |= {"network_def": definition, "source": str(tmp_path / "source.pt")}
    train("lora", tmp_path / "parts", given, dies_at=3)
    train("lora", tmp_path / "parts", given)
    whole = tmp_path / "whole"
    RISK_MAP.run("lora", **given | {"output_dir": str(whole), "epochs": 3, "val_interval": 3, "figures": True})
    model = weights_of(whole / "model.pt")
    torch.testing.assert_close(weights_of(tmp_path / "parts" / "model.pt"), model, rtol=0, atol=0)
    linear = {f"{name}.weight" for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    assert moved(network.state_dict(), model) == linear | {"out.conv.conv.weight", "out.conv.conv.bias"}
    weights = next(iter(linear))
    assert torch.linalg.matrix_rank(model[weights] - network.state_dict()[weights]) <= 8
    scored = given | {"output_dir": str(tmp_path / "scored"), "ckpt": str(whole / "model.pt")}
    RISK_MAP.run("evaluate", **{name: value for name, value in scored.items() if name not in ("epochs", "source")})
    one, other = (pd.read_csv(tmp_path / name / "metrics.csv").query("split == 'test'") for name in ("whole", "scored"))
    assert one["dice"].tolist() == pytest.approx(other["dice"].tolist(), abs=1e-5)


def test_a_spatial_adapter_is_trained_on_features_that_are_computed_once():
    before, trained, passes = unet(), [], [0, 0]
    for kept in range(2):
        network = copy.deepcopy(before)
        freeze(network, spatial_adapter(IMAGE, width=3))
        torch.manual_seed(1)
        network.final_conv.adapter[0].reset_parameters()

        def count(*_, kept=kept):
            passes[kept] += 1

        network.conv_0.register_forward_hook(count)
        optimizer = torch.optim.Adam((one for one in network.parameters() if one.requires_grad), lr=0.01)
        handlers = [] if not kept else [CachedFeatures(network=network)]
        trainer_of(network, *handlers, optimizer=optimizer).run()
        trained.append(network.state_dict())
    assert passes == [8, 2]
    torch.testing.assert_close(*trained)
    head = {f"final_conv.adapter.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")}
    old = {name.replace("final_conv", "final_conv.head"): value for name, value in before.state_dict().items()}
    assert {*trained[0]} - {*old} == head
    assert moved(old, trained[0]) == {"final_conv.head.weight", "final_conv.head.bias"}
    again, image = holding(before, trained[0]), torch.rand(1, 1, 16, 16)
    again.load_state_dict(trained[0])
    torch.testing.assert_close(again.eval()(image), network.eval()(image))
    assert "the head of this Sequential is a Linear" in refused(
        lambda: freeze(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(16, 2)), spatial_adapter(IMAGE))
    )


# What several trainings make


def test_a_soup_has_the_mean_weights_and_an_ensemble_the_mean_probabilities(options, tmp_path):
    networks, files = [unet().eval() for _ in range(3)], [str(tmp_path / f"{number}.pt") for number in range(3)]
    for network, file in zip(networks, files, strict=True):
        network.conv_0.conv_0.adn.N.running_mean.normal_()
        torch.save(network.state_dict(), file)
    image = torch.rand(2, 1, 32, 32)
    made = {}
    for recipe in OF_SEEDS:
        network = RISK_MAP.workflow(recipe, **options | {"members": files}).parser.get_parsed_content("network")
        made[recipe] = network.eval()
    for name, value in made["soup"].state_dict().items():
        torch.testing.assert_close(value, sum(one.state_dict()[name] for one in networks) / 3, check_dtype=False)
    with torch.no_grad():
        expected = sum(network(image).softmax(1) for network in networks) / 3
        torch.testing.assert_close(made["ensemble"](image).softmax(1), expected)
    torch.save(made["ensemble"].state_dict(), tmp_path / "model.pt")
    assert holding(unet(), files[0]).state_dict().keys() == unet().state_dict().keys()
    own = torch.nn.ModuleDict({"members": torch.nn.ModuleList([unet(), unet()])})  # somebody's own part of that name
    assert holding(own, own.state_dict()) is own
    given = {
        "ckpt": str(tmp_path / "model.pt"),
        "network_def#features": FEATURES,
        "spacing": [2] * 3,
        "roi_size": [32, 32],
    }
    parser = RISK_MAP.workflow(base="inference", **given).parser
    assert isinstance(parser.get_parsed_content("network"), Ensemble)
    assert "two trainings or more" in refused(lambda: soup(files[:1]))
    torch.save(BasicUNet(2, 1, 3, features=FEATURES).state_dict(), files[0])
    assert "expected trainings of one" in refused(lambda: soup(files))


def test_an_audit_of_several_seeds_makes_a_soup_and_an_ensemble_of_them_without_a_training(options, in_this_process):
    folder = Path(options["output_dir"])
    given = options | {"audit#arms": OF_SEEDS, "audit#folds": 2}
    assert "makes soup and ensemble of several trainings" in refused(lambda: RISK_MAP.run("lp_ft", **given))
    RISK_MAP.run("lp_ft", **given, **{"audit#seeds": 2})
    audit, minutes = read_json(folder / "audit.json"), pd.read_csv(folder / "audit.csv").set_index("arm")["minutes"]
    assert {*minutes.index.dropna()} >= {"lp_ft", "full", "soup", "ensemble"}
    assert minutes["soup"].max() == minutes["ensemble"].max() == minutes["full"].max() > 0
    assert not [path for path in trainings(folder) if {*OF_SEEDS} & {*path.parts}]
    for place in ("", "fold0of2", "fold1of2"):
        members = [folder / "audit/full" / (place + "_seed1" * bool(k) if place else "seed1" * k) for k in range(2)]
        one, other = (weights_of(member / "model.pt") for member in members)
        mixed = weights_of(folder / "audit/soup" / place / "model.pt")
        torch.testing.assert_close(mixed["final_conv.bias"], (one["final_conv.bias"] + other["final_conv.bias"]) / 2)
        both = weights_of(folder / "audit/ensemble" / place / "model.pt")
        assert torch.equal(both["members.1.final_conv.bias"], other["final_conv.bias"])
    before = len(in_this_process)
    RISK_MAP.run("lp_ft", **given, **{"audit#seeds": 3})
    assert {*OF_SEEDS} <= {path.name for path in in_this_process[before:]}
    assert len(read_json(folder / "audit/soup/config.json")["members"]) == 3
    assert audit["default"]


def test_a_comparison_trains_three_members_of_a_soup_and_an_ensemble(options, tmp_path, in_this_process):
    names = ("collection", "source_dir", "network_def#features")
    settings = {name: options[name] for name in names} | {"spacing": [6.2, 6.2, 8.0], "roi_size": [32, 32]}
    short = {"epochs": 1, "iterations_per_epoch": 1}
    settings |= {**short, "batch_size": 4, "check_data": False, "pretraining": short | {"augment": False}}
    asked = {
        "pairs": [["14-T2-ED", "17-T2-ED"]],
        "methods": ["full", *OF_SEEDS],
        "reference": "full",
        "train_slices": [4],
    }
    asked |= {"runs": [{"seed": 0, "source_seed": 0}], "settings": settings, "output_dir": str(tmp_path / "compared")}
    RISK_MAP.run(base="compare", **asked)
    of = tmp_path / "compared/runs/14-T2-ED_to_17-T2-ED/4"
    trained = [f"full/source0/seed{seed}" for seed in (0, 1000, 2000)]
    assert {str(path.relative_to(of)) for path in in_this_process[1:]} == {
        *trained,
        "soup/source0/seed0",
        "ensemble/source0/seed0",
    }
    one, *others = (weights_of(of / name / "model.pt")["final_conv.bias"] for name in trained)
    found = weights_of(of / "soup/source0/seed0/model.pt")["final_conv.bias"]
    torch.testing.assert_close(found, (one + sum(others)) / 3)
    table = pd.read_csv(tmp_path / "compared/comparison.csv")
    assert {*table["method"]} == {"full", *OF_SEEDS}


# What is done at inference


def test_a_mirrored_image_gets_the_mirrored_answer_in_training_inference_and_evaluation(options, tmp_path):
    given = options | {"grid#mirror": "true", "flip_axes": [0]}
    RISK_MAP.workflow("full", **given).parser.get_parsed_content("grid").write(tmp_path / "grid.json")
    ckpt, network, image = str(tmp_path / "source.pt"), unet().eval(), torch.rand(1, 1, 32, 32, 2)
    parsers = {
        "validate#inferer": [RISK_MAP.workflow("full", **options), RISK_MAP.workflow("full", **given)],
        "inferer": [RISK_MAP.workflow(base="inference", ckpt=ckpt, mirror=how) for how in ("false", "auto")],
    }
    for key, workflows in parsers.items():
        for workflow, same in zip(workflows, (False, True), strict=True):
            if key == "inferer":
                workflow.initialize()
            inferer = workflow.parser.get_parsed_content(key)
            with torch.no_grad():
                one, other = inferer(image, network), inferer(image.flip(2), network).flip(2)
            assert torch.allclose(one, other, atol=1e-6) == same
    scored = RISK_MAP.workflow("evaluate", **options | {"ckpt": ckpt}).parser.get_parsed_content("grid")
    assert scored.mirror
    assert "flip_axes names no axis" in refused(lambda: replace(scored, flip_axes=()).inferer)
