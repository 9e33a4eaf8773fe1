"""Scores by name: one pass of a source gives all of them, for all patients and for any resample of them."""

import json

import numpy as np
import pytest
import torch
from bundle_runs import REPOSITORY, refused
from monai.bundle import ConfigParser
from monai.data import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from medtl_ext import metrics
from medtl_ext.data import SliceDataset
from medtl_ext.metrics.features import Samples
from medtl_ext.transfer import SCORES, Card, Predictions, Source
from medtl_ext.transfer.scores import Observation, TargetSlices, observe, resampled_scores, score_values

EVERYBODY = [1] * 5


@pytest.fixture
def seen() -> Observation:
    """Five patients; features and predictions that separate the classes a little."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 2, 200))
    features = torch.from_numpy(random.normal(size=(200, 6))) + labels[:, None]
    groups = torch.from_numpy(random.integers(0, 5, 200))
    truth = torch.from_numpy((random.random((10, 6, 6)) < 0.4).astype(int))
    logits = torch.from_numpy(random.normal(size=(10, 2, 6, 6))).float()
    logits[:, 1] += truth
    names = tuple("abcde")
    own = torch.rand(50, 2).softmax(1), torch.arange(50) % 2
    maps = Samples(logits.softmax(1), truth, torch.arange(10) // 2, names)
    return Observation(Samples(features, labels, groups, names), maps, 1.5, own)


def score(name: str, seen: Observation, counts=EVERYBODY, **options) -> float:
    return resampled_scores(name, {"one": seen}, **options)(np.array(counts))["one"]


OF_SAMPLES = {
    "h_score": lambda x, y: metrics.compute_h_score(x, y, shrinkage="ledoit_wolf"),
    "logme": metrics.compute_logme,
    "gbc": metrics.compute_gbc,
    "transrate": metrics.compute_transrate,
    "sfda": metrics.compute_sfda,
    "parc": metrics.compute_parc,
    "nleep": metrics.compute_nleep,
    "lp": metrics.compute_label_prediction,
}
OF_IMAGES = {
    "leep": metrics.compute_leep,
    "nce": lambda probs, labels: metrics.compute_nce(probs.argmax(1), labels),
    "h_score_map": lambda probs, labels: metrics.compute_h_score_map(probs, labels).nanmean(),
}


@pytest.mark.parametrize("counts", [EVERYBODY, [2, 0, 3, 0, 0]], ids=str)
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_the_score_of_a_resample_is_that_of_its_pixels(name, counts, seen):
    rows = torch.arange(200).repeat_interleave(torch.tensor(counts)[seen.samples.groups])
    expected = float(OF_SAMPLES[name](seen.samples.features[rows], seen.samples.labels[rows]))
    assert score(name, seen, counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_score_of_a_resample_is_that_of_its_images(name, seen):
    rows = torch.tensor([2, 3, 2, 3, 4, 5, 8, 9])
    expected = OF_IMAGES[name](seen.maps.features[rows], seen.maps.labels[rows])
    assert score(name, seen, [0, 2, 1, 0, 1]) == pytest.approx(float(expected))


def test_the_probe_is_scored_on_patients_it_has_not_seen(seen):
    features, labels, groups = (part.numpy() for part in seen.samples[:3])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    probs = cross_val_predict(model, features, labels, groups=groups, cv=LeaveOneGroupOut(), method="predict_proba")
    assert score("probe_auc", seen) == pytest.approx(roc_auc_score(labels, probs[:, 1]))
    counts = [2, 1, 0, 1, 1]
    rows = np.repeat(np.arange(200), np.array(counts)[groups])
    assert score("probe_auc", seen, counts) == pytest.approx(roc_auc_score(labels[rows], probs[rows, 1]))


def test_otce_needs_the_sources_own_pixels(seen):
    assert -np.log(2) <= score("otce", seen) <= 0
    assert np.isnan(score("otce", Observation(seen.samples, seen.maps)))


def test_nleep_has_the_seed_of_the_run(seen):
    by_seed = [score("nleep", seen, seed=seed) for seed in (0, 3)]
    assert by_seed[0] != by_seed[1]
    expected = float(metrics.compute_nleep(seen.samples.features, seen.samples.labels, seed=3))
    assert by_seed[1] == pytest.approx(expected)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_a_number_of_every_source(name, seen):
    other = Observation(seen.samples._replace(features=seen.samples.features**2), seen.maps, 0.5, seen.source_pixels)
    found = score_values([name], {"one": seen, "two": other})[name]
    assert set(found) == {"one", "two"}
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


def test_scores_of_a_pool_are_scaled_over_it(seen):
    pool = {
        name: Observation(
            seen.samples._replace(features=seen.samples.features + shift * seen.samples.labels[:, None]), seen.maps, fu
        )
        for name, shift, fu in (("a", -0.7, 1.2), ("b", 0.0, 0.9), ("c", 2.0, 0.1))
    }
    lp = {name: score("lp", one) for name, one in pool.items()}
    fu = {name: one.fu for name, one in pool.items()}
    assert len(set(lp.values())) == 3
    for turned in (False, True):
        found = score_values(["lp_fu", "fu"], pool, cross_domain=turned)
        assert found["lp_fu"] == metrics.combine_lp_fu(lp, fu, cross_domain=turned)
        assert found["fu"] == fu
    terms = {name: metrics.compute_ncti(one.samples.features, one.samples.labels) for name, one in pool.items()}
    assert score_values(["ncti"], pool)["ncti"] == pytest.approx(metrics.combine_ncti(terms))


def test_predictions_do_not_depend_on_batches_or_their_order():
    probs, labels = torch.rand(5, 2, 3, 3), torch.randint(0, 2, (5, 1, 3, 3))
    images = [("b", 3, "p1"), ("a", 1, "p2"), ("a", 0, "p2"), ("c", 0, "p1"), ("b", 1, "p1")]
    whole, parts = Predictions(), Predictions()
    whole.update(probs, labels, images)
    for index in (4, 0, 3, 1, 2):
        parts.update(probs[[index]], labels[[index]], [images[index]])
    for one, other in zip(whole.compute()[:3], parts.compute()[:3], strict=True):
        assert torch.equal(one, other)
    assert whole.compute().groups.tolist() == [1, 1, 0, 0, 0]  # two scans of p1
    assert torch.equal(whole.compute().features[0], probs[2])


# The pass, with the evaluator of the bundle as it is written there


class Replay(nn.Module):
    """Returns the features and logits that its 'images' are made of."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.head = width, nn.Linear(width, 1)

    def forward(self, image):
        self.head(image[:, : self.width].float())  # the input of the last layer: the features
        return image[:, self.width :].float()


def observed(items, networks, *, batch_size=48, with_fu=False, convolutions=None) -> list[Observation]:
    config = json.loads((REPOSITORY / "bundles/dataset_transferability/configs/train.json").read_text())
    parser = ConfigParser({"score": config["score"], "seed": 0, "device": "$torch.device('cpu')"})
    parser["score#dataset"] = Dataset(items)
    parser["score#dataloader#batch_size"] = batch_size
    evaluator = parser.get_parsed_content("score#evaluator")
    source = Source("s", "checkpoint", Card(convolutions=convolutions))
    return [observe(source, network, evaluator, with_fu=with_fu) for network in networks]


def test_one_pass_of_the_config_gives_the_reference_values(vectors):
    data = vectors("cls_basic")
    images = torch.from_numpy(np.concatenate([data["features"], data["source_logits"]], 1))
    items = [
        {"image": image, "label": int(label), "subject": f"p{place % 12}"}
        for place, (image, label) in enumerate(zip(images, data["labels"], strict=True))
    ]
    (one,) = observed(items, [Replay(data["features"].shape[1])])
    assert len(one.samples.labels) == 240
    assert one.samples.names == one.maps.names
    assert np.isnan(one.fu)  # nothing asked for it
    everybody = [1] * 12
    expected = {"leep": "leep", "logme": "indep_logme", "sfda": "sfda", "h_score": "hscore_reg"}
    for name, key in (expected | {"gbc": "gbc_spherical_fulllogdet"}).items():  # float32 through the network
        assert score(name, one, everybody) == pytest.approx(float(data[key]), rel=1e-3), name
    # The references' components are approximate ones, and their neighbours those of another order of the samples.
    assert score("parc", one, everybody) == pytest.approx(float(data["parc_32"]), rel=0.1)
    assert score("lp", one, everybody) == pytest.approx(float(data["lp_nca"]), abs=0.02)


def test_feature_update_in_the_pass_equals_the_reference(vectors):
    data = vectors("fu_tinycnn")
    body = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10), nn.Linear(10, 3))
    names = [f"{layer}_{part}" for layer in ("conv1", "conv2", "fc") for part in ("weight", "bias")]
    state = dict(zip(network[:7].state_dict(), (torch.from_numpy(data[name]) for name in names), strict=True))
    network[:7].load_state_dict(state)
    items = [
        {"image": torch.from_numpy(image), "label": int(label), "subject": "p"}
        for image, label in zip(data["images"], data["labels"], strict=True)
    ]
    fu = {"batch_size": 6, "with_fu": True}
    # The second is not scored with the first one's gradients.
    seen = observed(items, [network, network], **fu)
    assert [one.fu for one in seen] == pytest.approx([float(data["fu"])] * 2, abs=1e-5)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 3))
    for net, options, said in [
        (network, {"convolutions": ("c1", "c2")}, "source s: convolutions 'c1' is unknown"),
        (linear, {}, "source s: network ran 0 convolution"),
    ]:
        text = refused(lambda net=net, options=options: observed(items, [net], **fu, **options))
        assert said in text
        assert "name them as 'convolutions' of the source" in text


def test_probabilities_on_a_sources_grid_come_to_the_targets_slices_and_are_background_outside():
    volume = torch.zeros(1, 4, 4, 3)
    volume[..., 1] = 1
    slices = SliceDataset([{"image": volume, "label": volume, "subject": "a"}], [], progress=False)
    probs = torch.stack([torch.full((4, 4, 2), 0.25), torch.full((4, 4, 2), 0.75)])
    shifted = torch.eye(4)
    shifted[0, 3], shifted[2, 3] = 2, 1  # its field of view begins at x = 2 and at the middle slice
    places, found, labels = TargetSlices(slices)("a", probs, shifted)
    assert (places, labels.shape) == ([1], (1, 1, 4, 4))
    torch.testing.assert_close(found[0, 1, :, 0], torch.tensor([0.0, 0.0, 0.75, 0.75]))
    torch.testing.assert_close(found.sum(1), torch.ones(1, 4, 4))
