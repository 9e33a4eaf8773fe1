"""The conformance suite finds broken metrics (`test_metrics.py` tests ours)."""

import warnings

import pytest
import torch

from medtl_ext.metrics import LEEP, TransferMetric
from medtl_ext.testing import check_metric, metric_checks


class Forgetful(LEEP):
    """Keeps the last batch only."""

    def update(self, source_probs, target_labels):
        self.reset()
        super().update(source_probs, target_labels)


class Selfish(LEEP):
    def merge(self, other):
        pass


class Ordered(TransferMetric):
    """The first sample counts most."""

    def update(self, source_probs, target_labels):
        self._add(first=torch.as_tensor(source_probs)[0].double())

    def _evaluate(self, sums):
        return sums["first"]


class Single(LEEP):
    def compute(self):
        return super().compute().float()


class Credulous(LEEP):
    def update(self, source_probs, target_labels):
        super().update(torch.nan_to_num(torch.as_tensor(source_probs), nan=0.5, posinf=0.5).softmax(1), target_labels)


class Named(LEEP):
    def _evaluate(self, sums):
        return super()._evaluate(sums) * sums["joint"].shape[0]


class Spoiler(LEEP):
    def update(self, source_probs, target_labels):
        super().update(source_probs, target_labels)
        source_probs[:] = 0.5


class Silent(LEEP):
    def compute(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().compute()


class Undocumented(LEEP):
    """Says nothing of its arguments, and shows no example."""


@pytest.mark.parametrize(
    ("metric", "check", "message"),
    [
        (Forgetful, "split", "batches of"),
        (Selfish, "merge", "seen no sample|merging"),
        (Ordered, "same_samples", "another order of the samples"),
        (Single, "split", "not float64"),
        (Credulous, "bad_input", "accepts nan in source_probs"),
        (Named, "same_samples", "a gap in the labels"),
        (Spoiler, "inputs", "changes its inputs"),
        (Silent, "degenerate_input", "no UserWarning"),
        (Undocumented, "docstrings", "no example"),
        (Forgetful, "state", "updates after compute"),
    ],
)
def test_broken_metrics_are_caught(metric, check, message):
    with pytest.raises((AssertionError, ValueError, RuntimeError), match=message):
        dict(metric_checks(metric))[check]()


def test_a_third_party_metric_in_one_call():
    check_metric(LEEP, make=lambda: LEEP(ignore_index=99))
