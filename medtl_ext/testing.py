"""A conformance suite for transferability metrics: hold your own `TransferMetric` against it, as ours are held.

In pytest::

    @pytest.mark.parametrize(("name", "check"), metric_checks(MyMetric))
    def test_my_metric(name, check):
        check()

or in one call: ``check_metric(MyMetric)``.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine

from medtl_ext.metrics.base import TransferMetric

__all__ = ["check_metric", "metric_checks"]

# How far values may lie apart: the same sums in another order; the same input in single and in half precision.
EXACT, SINGLE, HALF = 1e-9, 1e-4, 0.05


def check_metric(
    metric: type[TransferMetric],
    *,
    make: Callable[[], TransferMetric] | None = None,
    grid: Sequence[int] = (),
    per_sample: bool = False,
) -> None:
    """Raise an AssertionError that says which promise of a transferability metric is broken, and how.

    What is checked: any division into batches, merged in any order, gives the one-shot value to 1e-9; so do another
    order of the samples, other names of the classes, a gap in the labels, a copy through pickle and an Ignite engine;
    lower precision and CUDA (where there is one) come close; bad input is refused with a ValueError that leaves the
    metric as it was; degenerate input gives finite values, one class alone with a warning; inputs are left unchanged;
    the docstrings say what they should.

    Args:
        metric: the class.
        make: makes a metric; by default the class without arguments.
        grid: size of the images, e.g. ``(6, 5)``, for a metric that needs pixels; samples by default.
        per_sample: the value holds one entry for each sample, in their order.

    >>> from medtl_ext.metrics import LEEP
    >>> check_metric(LEEP)
    """
    for _, check in metric_checks(metric, make=make, grid=grid, per_sample=per_sample):
        check()


def metric_checks(
    metric: type[TransferMetric],
    *,
    make: Callable[[], TransferMetric] | None = None,
    grid: Sequence[int] = (),
    per_sample: bool = False,
) -> list[tuple[str, Callable[[], None]]]:
    """The checks of `check_metric` with their names, to run (and to fail) one by one; arguments as there.

    >>> from medtl_ext.metrics import LEEP
    >>> [name for name, _ in metric_checks(LEEP)][:3]
    ['split', 'merge', 'permutation']
    """
    suite = _Suite(metric, make or metric, tuple(grid), per_sample)
    return [(name.removeprefix("check_"), getattr(suite, name)) for name in vars(_Suite) if name.startswith("check_")]


def example(inputs: Sequence[str], *, grid: Sequence[int] = (), n: int = 48, seed: int = 0) -> list[torch.Tensor]:
    """Arguments of `update` for ``n`` samples (or images) of three classes, told apart in part, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n).view(-1, *(1 for _ in grid)).expand(n, *grid) % 3
    if grid:
        labels = torch.randint(3, (n, *grid), generator=generator)
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 2
    features = centres[labels] + torch.randn(*labels.shape, 5, generator=generator, dtype=torch.float64)
    features = features.movedim(-1, 1).contiguous()
    known = {
        "features": features,
        "source_probs": features.softmax(1),
        "source_labels": features.argmax(1),
        "target_labels": labels.contiguous(),
    }
    unknown = [name for name in inputs if name not in known]
    assert not unknown, f"inputs names {unknown}; the suite can make {sorted(known)}"
    return [known[name] for name in inputs]


@dataclass
class _Suite:
    metric: type[TransferMetric]
    make: Callable[[], TransferMetric]
    grid: tuple[int, ...]
    per_sample: bool

    def check_split(self) -> None:
        whole = self._value(self._example())
        for sizes in ([1] * 4 + [44], [47, 1], [16, 16, 16]):
            self._same(self._value(*self._parts(sizes)), whole, f"batches of {sizes}")

    def check_merge(self) -> None:
        whole = self._value(self._example())
        for order in ([0, 1, 2], [0, 1, 2] if self.per_sample else [2, 0, 1]):
            parts = [self._fed(part) for part in self._parts([10, 20, 18])]
            before = _plain(parts[order[1]].compute())
            total = self.make()
            for index in order:
                total.merge(parts[index])
            self._same(total.compute(), whole, f"merging in the order {order}")
            self._same(parts[order[1]].compute(), before, "the metric that was merged into another, afterwards,")

        class Other(TransferMetric):
            update = _evaluate = None

        self._refuses(lambda: self.make().merge(Other.__new__(Other)), "merge with a metric of another class")

    def check_permutation(self) -> None:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
        turned = self._value([value[order] for value in self._example()])
        if self.per_sample:
            turned = turned[order.argsort()]
        self._same(turned, self._value(self._example()), "another order of the samples")

    def check_relabelling(self) -> None:
        whole = self._value(self._example())
        for names, what in (([2, 0, 1], "other names of the classes"), ([0, 3, 7], "a gap in the labels")):
            *others, labels = self._example()
            self._same(self._value([*others, torch.tensor(names)[labels]]), whole, what)

    def check_dtype(self) -> None:
        values = self._example()
        whole = self._value(values)
        assert all(tensor.dtype == torch.float64 for tensor in _tensors(whole)), (
            f"{self._name}: the value is not float64"
        )
        for dtype, tolerance in ((torch.float32, SINGLE), (torch.float16, HALF), (torch.bfloat16, HALF)):
            lower = [value.to(dtype) if value.is_floating_point() else value for value in values]
            self._same(self._value(lower), whole, str(dtype), tolerance)
        for dtype in (torch.uint8, torch.int32, torch.float32):
            self._same(self._value([*values[:-1], values[-1].to(dtype)]), whole, f"labels of {dtype}")
        self._same(self._value([value.numpy() for value in values]), whole, "numpy arrays")

    def check_layout(self) -> None:
        values = self._example()
        copies = [value.clone() for value in values]
        whole = self._value(values)
        unchanged = all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))
        assert unchanged, f"{self._name} changes its inputs"
        strided = [torch.stack([value, value], -1)[..., 0] for value in values]
        self._same(self._value(strided), whole, "non-contiguous tensors")
        tracked = [value.clone().requires_grad_() if value.is_floating_point() else value for value in values]
        value = self._value(tracked)
        assert not any(tensor.requires_grad for tensor in _tensors(value)), (
            f"{self._name}: the value carries a gradient"
        )
        self._same(value, whole, "tensors that require a gradient")

    def check_device(self) -> None:
        if torch.cuda.is_available():
            values = [value.cuda() for value in self._example()]
            value = self._value(values)
            assert all(tensor.is_cuda for tensor in _tensors(value)), f"{self._name}: the value left the input's device"
            self._same(_plain(value, torch.device("cpu")), self._value(self._example()), "CUDA", 1e-7)

    def check_bad_input(self) -> None:
        metric = self._fed(self._example())
        before = _plain(metric.compute())
        for what, values in self._bad():
            self._refuses(lambda values=values: metric.update(*values), what)
            self._same(metric.compute(), before, f"after a refused batch ({what})")
        self._refuses(lambda: self.make().compute(), "compute() before anything was seen")

    def check_degenerate_input(self) -> None:
        *others, labels = self._example()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._finite(self._value([*others, torch.zeros_like(labels)]), "one class only")
        warned = any(issubclass(warning.category, UserWarning) for warning in caught)
        assert warned, f"{self._name}: one class only says nothing about transfer, but there is no UserWarning"
        lonely = torch.where(labels == 2, 1, labels)
        lonely.view(-1)[0] = 2
        self._finite(self._value([*others, lonely]), "a class of one sample")
        constant = [_constant(value) for value in others]
        self._finite(self._value([*constant, labels]), "the same prediction for every sample")

    def check_state(self) -> None:
        first, second = self._parts([30, 18])
        metric = self._fed(first)
        self._same(metric.compute(), metric.compute(), "a second compute()")
        metric.update(*second)
        whole = self._value(self._example())
        self._same(metric.compute(), whole, "updates after compute()")
        self._same(pickle.loads(pickle.dumps(metric)).compute(), whole, "a copy through pickle")
        metric.reset()
        self._refuses(metric.compute, "compute() after reset()")

    def check_engine(self) -> None:
        metric = self.make()
        metric._output_transform, metric._tapped = (lambda output: output), False
        engine = Engine(lambda engine, batch: batch)
        metric.attach(engine, "metric")
        state = engine.run([tuple(part) for part in self._parts([20, 20, 8])])
        self._same(state.metrics["metric"], self._value(self._example()), "an Ignite engine")

    def check_docstrings(self) -> None:
        assert isinstance(self.metric.higher_is_better, bool), f"{self._name}.higher_is_better is not True or False"
        text = inspect.getdoc(self.metric) or ""
        base = inspect.getdoc(TransferMetric)
        assert text not in ("", base), f"{self._name} has no docstring"
        assert ">>>" in text, f"{self._name}: the docstring has no example (>>>)"
        parameters = list(inspect.signature(self.metric).parameters)
        missing = [name for name in parameters if name not in text and name not in _inherited(self.metric)]
        assert not missing, f"{self._name}: the docstring does not explain {', '.join(missing)}"

    @property
    def _name(self) -> str:
        return self.metric.__name__

    def _example(self) -> list[torch.Tensor]:
        return example(self.metric.inputs, grid=self.grid)

    def _parts(self, sizes: Sequence[int]) -> list[list[torch.Tensor]]:
        return [list(part) for part in zip(*(value.split(list(sizes)) for value in self._example()), strict=True)]

    def _fed(self, *batches: Sequence[Any]) -> TransferMetric:
        metric = self.make()
        for batch in batches:
            metric.update(*batch)
        return metric

    def _value(self, *batches: Sequence[Any]) -> Any:
        return self._fed(*batches).compute()

    def _bad(self) -> Iterator[tuple[str, list[Any]]]:
        *others, labels = self._example()
        for bad in (torch.nan, torch.inf) if others[0].is_floating_point() else ():
            broken = others[0].clone()
            broken.view(-1)[3] = bad
            yield f"{bad} in {self.metric.inputs[0]}", [broken, *others[1:], labels]
        yield "an empty batch", [value[:0] for value in (*others, labels)]
        yield "fewer labels than samples", [*others, labels[:-1]]
        yield "a negative label", [*others, torch.where(labels == 1, -1, labels)]
        yield "labels that are not integers", [*others, labels + 0.5]

    def _same(self, value: Any, expected: Any, what: str, tolerance: float = EXACT) -> None:
        found, wanted = _tensors(value), _tensors(expected)
        alike = len(found) == len(wanted) and all(a.shape == b.shape for a, b in zip(found, wanted, strict=True))
        assert alike, f"{self._name}: {what} gives a value of another form"
        for a, b in zip(found, wanted, strict=True):
            close = torch.isclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
            assert bool(close.all()), f"{self._name}: {what} gives {_short(a)} instead of {_short(b)}"

    def _finite(self, value: Any, what: str) -> None:
        assert all(bool(tensor.isfinite().all()) for tensor in _tensors(value)), f"{self._name}: {what} gives {value}"

    def _refuses(self, action: Callable[[], Any], what: str) -> None:
        try:
            action()
        except ValueError:
            return
        except Exception as error:
            raise AssertionError(
                f"{self._name}: {what} raises {type(error).__name__} ({error}); expected a ValueError"
            ) from error
        raise AssertionError(f"{self._name}: {what} is accepted; expected a ValueError")


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a value: one, or a (named) tuple or list of them."""
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float64)]


def _plain(value: Any, device: torch.device | None = None) -> list[torch.Tensor]:
    return [tensor.clone().to(device or tensor.device) for tensor in _tensors(value)]


def _constant(value: torch.Tensor) -> torch.Tensor:
    return value.flatten()[:1].expand(value.shape).clone() if value.ndim == 1 else value[:1].expand(value.shape).clone()


def _inherited(metric: type[TransferMetric]) -> set[str]:
    """Names of arguments that a base class of the metric explains."""
    texts = [inspect.getdoc(base) or "" for base in metric.__mro__[1:] if issubclass(base, TransferMetric)]
    return {name for name in inspect.signature(metric).parameters if any(f"{name}:" in text for text in texts)}


def _short(tensor: torch.Tensor) -> str:
    return f"{tensor.item():.12g}" if tensor.numel() == 1 else f"a tensor with mean {tensor.double().nanmean():.12g}"
