"""A conformance suite for transferability metrics: test your own `TransferMetric` with it, as we test ours.

In pytest::

    @pytest.mark.parametrize(("name", "check"), metric_checks(MyMetric))
    def test_my_metric(name, check):
        check()

or in one call: ``check_metric(MyMetric)``.
"""

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from ignite.engine import Engine

from medtl_ext.metrics.base import TransferMetric

# Tolerances: for the same sums in another order, and for the same input in single and in half precision.
EXACT, SINGLE, HALF = 1e-9, 1e-4, 0.05

SIZE = 48


def check_metric(metric: type[TransferMetric], **options: Any) -> None:
    """Check a transferability metric; raise an AssertionError that says which requirement fails, and how.

    Any division into batches, merged in any order, must give the one-shot value to 1e-9. The same holds for another
    order of the samples, other names of the classes, a gap in the labels, a copy through pickle, and an Ignite engine.
    Lower precision and CUDA (if available) must give similar values. Invalid input must raise a ValueError and leave
    the metric as it was. Degenerate input must give finite values, and one class only must also give a warning. Inputs
    must stay unchanged. The docstring must explain the arguments and show an example.

    Args:
        metric: the class.
        options: make, grid and per_sample of `metric_checks`.

    >>> from medtl_ext.metrics import LEEP
    >>> check_metric(LEEP)
    """
    for _, check in metric_checks(metric, **options):
        check()


def metric_checks(
    metric: type[TransferMetric],
    *,
    make: Callable[[], TransferMetric] | None = None,
    grid: Sequence[int] = (),
    per_sample: bool = False,
) -> list[tuple[str, Callable[[], None]]]:
    """The checks of `check_metric` with their names, to run them one by one.

    Args:
        metric: the class.
        make: function that makes a metric; by default the class without arguments.
        grid: size of the images, such as ``(6, 5)``, for a metric that needs pixels. Default: samples without grid.
        per_sample: the value has one entry for each sample, in their order.

    >>> from medtl_ext.metrics import LEEP
    >>> [name for name, _ in metric_checks(LEEP)][:3]
    ['split', 'merge', 'same_samples']
    """
    suite = _Suite(metric, make or metric, example(metric.inputs, grid=grid), per_sample)
    return [(name.removeprefix("check_"), getattr(suite, name)) for name in vars(_Suite) if name.startswith("check_")]


def example(inputs: Sequence[str], *, grid: Sequence[int] = (), n: int = SIZE, seed: int = 0) -> list[torch.Tensor]:
    """Arguments of `update` for ``n`` samples (or images) of three overlapping classes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n, *grid), generator=generator) if grid else torch.arange(n) % 3
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 2
    features = centres[labels] + torch.randn(*labels.shape, 5, generator=generator, dtype=torch.float64)
    features = features.movedim(-1, 1).contiguous()
    known = {
        "features": features,
        "source_probs": features.softmax(1),
        "source_labels": features.argmax(1),
        "target_labels": labels,
    }
    assert set(inputs) <= set(known), f"inputs are {inputs}; the suite can make {sorted(known)}"
    return [known[name] for name in inputs]


@dataclass
class _Suite:
    metric: type[TransferMetric]
    make: Callable[[], TransferMetric]
    example: list[torch.Tensor]
    per_sample: bool

    def check_split(self) -> None:
        for sizes in ([1] * 4 + [44], [47, 1], [16, 16, 16]):
            self._same(self._value(*self._parts(sizes)), f"batches of {sizes}")

    def check_merge(self) -> None:
        for order in ([0, 1, 2], [0, 1, 2] if self.per_sample else [2, 0, 1]):
            total, parts = self.make(), [self._fed(part) for part in self._parts([10, 20, 18])]
            before = parts[order[1]].compute()
            for index in order:
                total.merge(parts[index])
            self._same(total.compute(), f"merging in the order {order}")
            self._same(parts[order[1]].compute(), "the metric that was merged into another, afterwards,", before)

        class Other(TransferMetric):
            update = _evaluate = None

        with self._refusal("merge with a metric of another class"):
            self.make().merge(Other.__new__(Other))

    def check_same_samples(self) -> None:
        """The same samples in another order, with other class names, in another dtype, memory layout or device."""
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
        turned = self._value([value[order] for value in self.example])
        self._same(turned[order.argsort()] if self.per_sample else turned, "another order of the samples")
        *others, labels = self.example
        for names, what in (([2, 0, 1], "other names of the classes"), ([0, 3, 7], "a gap in the labels")):
            self._same(self._value([*others, torch.tensor(names)[labels]]), what)
        for dtype in (torch.uint8, torch.int32, torch.float32):
            self._same(self._value([*others, labels.to(dtype)]), f"labels of {dtype}")
        changes: dict[str, Callable[[torch.Tensor], Any]] = {
            "numpy arrays": lambda value: value.numpy(),
            "non-contiguous tensors": lambda value: torch.stack([value, value], -1)[..., 0],
            "tensors that require a gradient": lambda v: v.clone().requires_grad_() if v.is_floating_point() else v,
        }
        for what, change in changes.items():
            self._same(self._value([change(value) for value in self.example]), what)
        for dtype, tolerance in ((torch.float32, SINGLE), (torch.float16, HALF), (torch.bfloat16, HALF)):
            lower = [value.to(dtype) if value.is_floating_point() else value for value in others]
            self._same(self._value([*lower, labels]), str(dtype), tolerance=tolerance)
        if torch.cuda.is_available():
            value = self._value([value.cuda() for value in self.example])
            self._require(all(tensor.is_cuda for tensor in _tensors(value)), "loses the input's device")
            self._same(value, "CUDA", tolerance=1e-7)

    def check_inputs(self) -> None:
        copies = [value.clone() for value in self.example]
        self._value(copies)
        self._require(all(map(torch.equal, copies, self.example)), "changes its inputs")

    def check_bad_input(self) -> None:
        metric = self._fed(self.example)
        *others, labels = self.example
        batches = {
            "an empty batch": [value[:0] for value in self.example],
            "fewer labels than samples": [*others, labels[:-1]],
            "a negative label": [*others, torch.where(labels == 1, -1, labels)],
            "labels that are not integers": [*others, labels + 0.5],
        }
        for bad in (torch.nan, torch.inf) if others[0].is_floating_point() else ():
            broken = others[0].flatten().index_fill(0, torch.tensor(3), bad).view(others[0].shape)
            batches[f"{bad} in {self.metric.inputs[0]}"] = [broken, *others[1:], labels]
        for what, batch in batches.items():
            with self._refusal(what):
                metric.update(*batch)
            self._same(metric.compute(), f"after a refused batch ({what})")

    def check_degenerate_input(self) -> None:
        *others, labels = self.example
        lonely = torch.where(labels == 2, 1, labels)
        lonely.view(-1)[0] = 2
        constant = [value[:1].expand(value.shape) for value in others]
        batches = {
            "a class of one sample": [*others, lonely],
            "the same prediction for every sample": [*constant, labels],
            "one class only": [*others, torch.zeros_like(labels)],
        }
        for what, batch in batches.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value = self._value(batch)
            self._require(all(bool(tensor.isfinite().all()) for tensor in _tensors(value)), f"makes {value} of {what}")
        warned = any(issubclass(warning.category, UserWarning) for warning in caught)
        self._require(warned, "issues no UserWarning for one class only, which says nothing about transfer")

    def check_state(self) -> None:
        metric = self.make()
        with self._refusal("compute() before anything was seen"):
            metric.compute()
        for part in self._parts([30, 18]):
            metric.update(*part)
            first = metric.compute()
            self._same(metric.compute(), "a second compute()", first)
        self._same(first, "updates after compute()")
        self._same(pickle.loads(pickle.dumps(metric)).compute(), "a copy through pickle")
        metric.reset()
        with self._refusal("compute() after reset()"):
            metric.compute()

    def check_engine(self) -> None:
        metric = self.make()
        metric._output_transform, metric._tapped = (lambda output: output), False
        engine = Engine(lambda engine, batch: batch)
        metric.attach(engine, "metric")
        state = engine.run([tuple(part) for part in self._parts([20, 20, 8])])
        self._same(state.metrics["metric"], "an Ignite engine")

    def check_docstrings(self) -> None:
        self._require(isinstance(self.metric.higher_is_better, bool), "has no higher_is_better that is True or False")
        bases = [base for base in self.metric.__mro__ if issubclass(base, TransferMetric)]
        text, *inherited = (inspect.getdoc(base) or "" for base in bases)
        self._require(text not in ("", *inherited), "has no docstring")
        self._require(">>>" in text, "has no example (>>>) in its docstring")
        for name in inspect.signature(self.metric).parameters:
            explained = name in text or any(f"{name}:" in other for other in inherited)
            self._require(explained, f"does not explain {name} in its docstring")

    @cached_property
    def _whole(self) -> Any:
        return self._value(self.example)

    def _require(self, kept: bool, what: str) -> None:
        if not kept:
            raise AssertionError(f"{self.metric.__name__} {what}")

    def _parts(self, sizes: Sequence[int]) -> list[list[torch.Tensor]]:
        return [list(part) for part in zip(*(value.split(sizes) for value in self.example), strict=True)]

    def _fed(self, *batches: Sequence[Any]) -> TransferMetric:
        metric = self.make()
        for batch in batches:
            metric.update(*batch)
        return metric

    def _value(self, *batches: Sequence[Any]) -> Any:
        value = self._fed(*batches).compute()
        for tensor in _tensors(value):
            self._require(tensor.dtype == torch.float64, "gives a value that is not float64")
            self._require(not tensor.requires_grad, "gives a value with a gradient")
        return value

    def _same(self, value: Any, what: str, expected: Any = None, *, tolerance: float = EXACT) -> None:
        """Compare a value with another one, or with that of all samples in one batch."""
        expected = self._whole if expected is None else expected
        how = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_device": False}
        message = f"{self.metric.__name__}: {what} gives another value. {{}}".format
        torch.testing.assert_close(_tensors(value), _tensors(expected), **how, msg=message)

    @contextmanager
    def _refusal(self, what: str) -> Iterator[None]:
        try:
            yield
        except ValueError:
            return
        self._require(False, f"accepts {what}; expected a ValueError")


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a value: one, or a (named) tuple or list of them."""
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)]
