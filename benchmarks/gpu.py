"""What a card gives: training steps, passes of metrics, memory, the same numbers as the processor, resumption.

    python benchmarks/gpu.py            # on the first GPU, a few minutes; on the CPU where there is none
    python benchmarks/gpu.py --small    # sizes for a try on a CPU

Prints one table: of training the steps a second and the most memory, plain and in mixed precision, channels last or
not, with and without the weighted loss; seconds of each metric's pass; how far metrics and losses on the device are
from those on the CPU; whether a training that is interrupted after an epoch ends at the weights of one in one go.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pandas as pd
import torch
from monai.networks.nets import BasicUNet

from medtl_ext import metrics
from medtl_ext.losses import RiskWeightedLoss, risk_map
from medtl_ext.networks import prepared

FEATURES = ["HScore", "LogME", "GBC", "TransRate", "SFDA", "NCTI", "PARC"]
SMALLEST = (2, 1, 32, 32)
Row = tuple[str, str, float, str]


def synchronized(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action, with all that the card still does."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training(
    device: torch.device, size: tuple[int, ...], *, weighted: bool = True, amp: bool = False, last: bool = False
) -> tuple[Callable[[], None], torch.nn.Module, torch.optim.Optimizer]:
    """A step of the default network, the network and its optimizer."""
    torch.manual_seed(0)
    dims = len(size) - 2
    layout = (torch.channels_last if dims == 2 else torch.channels_last_3d) if last else None
    network = BasicUNet(spatial_dims=dims, in_channels=1, out_channels=2, features=(8, 16, 32, 64, 128, 8))
    network = prepared(network, device=device, memory_format=layout).train()
    images = torch.rand(size, device=device)
    labels = (images[:, 0] > 0.7).long()
    loss = torch.nn.CrossEntropyLoss()
    if weighted:
        weight = risk_map(-torch.rand(size[2:], device=device))
        loss = RiskWeightedLoss(torch.nn.CrossEntropyLoss(reduction="none"), weight).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = network(images)
        loss(logits.float(), labels).backward()
        optimizer.step()

    return step, network, optimizer


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    steps = 1 if small else 50
    for size in ((2, 1, 32, 32), (1, 1, 32, 32, 32)) if small else ((8, 1, 192, 192), (2, 1, 128, 128, 128)):
        for weighted, amp, last in product((False, True), repeat=3):
            step, *_ = training(device, size, weighted=weighted, amp=amp, last=last)
            synchronized(step, device)  # sets up what the others use
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = sum(synchronized(step, device) for _ in range(steps))
            memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
            how = ", ".join(
                name for name, on in {"weighted": weighted, "AMP": amp, "channels last": last}.items() if on
            )
            yield "training", f"{'x'.join(map(str, size))} {how}", steps / seconds, f"steps a second, {memory:.1f} GB"
    n = 2_000 if small else 50_000
    labels = torch.arange(n) % 4
    features = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    for name in FEATURES:
        values = []
        for where in (torch.device("cpu"), device):
            metric, given = getattr(metrics, name)(), (features.to(where), labels.to(where))
            seconds = synchronized(partial(metric.update, *given), where)
            began = time.perf_counter()
            values.append(float(torch.as_tensor(metric.compute()).double().sum()))  # NCTI has three terms
        yield "pass", f"{name}, {n} x 64", seconds + time.perf_counter() - began, "seconds"
        yield "parity", name, abs(values[1] - values[0]) / max(abs(values[0]), 1e-12), "relative difference from CPU"
    ends = []
    for where in (torch.device("cpu"), device):
        step, network, _ = training(where, SMALLEST)
        step()
        ends.append(weights_of(network))
    yield "parity", "a step with the weighted loss", float((ends[0] - ends[1]).abs().max()), "largest difference"
    for size in (SMALLEST, (1, 1, 32, 32, 32)):
        (step, *whole), (first, *before), (second, *after) = (training(device, size) for _ in range(3))
        step(), step(), first()
        file = io.BytesIO()
        torch.save([one.state_dict() for one in before], file)
        for one, state in zip(after, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
            one.load_state_dict(state)
        second()
        same = torch.equal(weights_of(whole[0]), weights_of(after[0]))
        yield "resumption", f"a second step, {len(size) - 2}D: the same bits", float(same), "1 if so"


def weights_of(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().cpu() for value in network.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = pd.DataFrame(rows(device, parser.parse_args().small), columns=["what", "of", "value", "unit"])
    print(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: on the CPU")
    print(found.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
