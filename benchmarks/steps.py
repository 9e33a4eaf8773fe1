"""Where the time of a training step goes: data, forward pass, loss and backward pass, update; seconds, medians.

    python benchmarks/steps.py COLLECTION TASK [--threads 2] [--options '{"roi_size": [64, 64]}']

Trains from scratch as the bundle risk_map does, with these options laid over. ``benchmarks/nnunet.py`` prints what a
step of nnU-Net takes on the same patients; its network and patches are the options in ``NNUNET``, by ``--nnunet``.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "risk_map" / "configs"
NNUNET = json.loads(Path(__file__).with_name("training.json").read_text())["nnU-Net's network, half as wide"]
NNUNET |= {"network_def#filters": [32, 64, 128, 256], "roi_size": [40, 56, 40]}
PARTS = {
    "data": Events.GET_BATCH_COMPLETED,
    "forward": IterationEvents.FORWARD_COMPLETED,
    "loss and backward": IterationEvents.BACKWARD_COMPLETED,
    "update": IterationEvents.MODEL_COMPLETED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection")
    parser.add_argument("task")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--nnunet", action="store_true", help="nnU-Net's network and patch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    seconds, last = defaultdict(list), [0.0]

    def note(engine: Engine, part: str) -> None:
        seconds[part].append((now := perf_counter()) - last[0])
        last[0] = now

    with tempfile.TemporaryDirectory() as folder:
        options = {"collection": given.collection, "target_task": given.task, "source": None, "check_data": False}
        options |= {"epochs": 1, "iterations_per_epoch": given.steps + 2, "output_dir": folder, "progress": False}
        options |= (NNUNET if given.nnunet else {}) | given.options
        files = [str(CONFIGS / f"{name}.json") for name in ("train", "scratch")]
        workflow = ConfigWorkflow(files, workflow_type="train", **options)
        workflow.initialize()
        torch.set_num_threads(given.threads)
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: last.__setitem__(0, perf_counter()))
        for part, event in PARTS.items():
            trainer.add_event_handler(event, note, part)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=given.steps + 2), trainer.terminate)
        trainer.run()
    medians = {part: median(values[2:]) for part, values in seconds.items()}
    whole = sum(medians.values())
    print(f"{whole:.3f} s a step on {given.threads} threads:")
    print("\n".join(f"  {part:18} {value:.3f} s, {value / whole:.0%}" for part, value in medians.items()))


if __name__ == "__main__":
    main()
