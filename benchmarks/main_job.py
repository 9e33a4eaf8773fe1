"""Where the time of the main job goes: seconds of the processor by part, of this process and of all that it starts.

    python benchmarks/main_job.py [--options '{"audit#folds": 0}']

Makes the phantom and pre-trains the source anew, in a temporary folder. Other work on the machine changes seconds of
the processor far less than those of the clock, which are printed beside them.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

BEGAN = time.perf_counter()
TICKS = os.sysconf("SC_CLK_TCK")
CONFIG = Path(__file__).resolve().parents[1] / "bundles" / "risk_map" / "configs" / "train.json"
CALLED = {
    "$@check.run()": "check of the data",
    "$@evaluation.run()": "scores of the patients",
    "$@audit.run()": "audit",
}
CALLED |= {"$@pictures.run()": "figures and report", "$@report.write()": "figures and report"}


def processor() -> float:
    """Seconds of all processes of this group, and of those that ended and were waited for."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == os.getpgrp():
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=json.loads, default={})
    options, spent, last = parser.parse_args().options, {}, [0.0, BEGAN]

    def note(part: str) -> None:
        now = [processor(), time.perf_counter()]
        spent[part] = [spent.get(part, [0, 0])[k] + now[k] - last[k] for k in (0, 1)]
        last[:] = now

    from ignite.engine import Events
    from monai.bundle import ConfigWorkflow

    import medtl_ext.transfer

    note(f"imports of PyTorch, MONAI and {medtl_ext.__name__}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MONAI_DATA_DIRECTORY"] = f"{folder}/data"
        places = {
            "bundle_root": str(CONFIG.parents[1]),
            "output_dir": f"{folder}/out",
            "source_dir": f"{folder}/sources",
            "progress": False,
        }
        workflow = ConfigWorkflow(str(CONFIG), workflow_type="train", **places | options)
        workflow.initialize()
        get = workflow.parser.get_parsed_content
        get("target")
        note("phantom")
        get("network")
        note("pre-training of the source")
        for place, step in enumerate(workflow.parser["run"]):
            if "trainer" in step:  # the map comes before the first epoch
                first = partial(note, "training slices and risk map")
                get("train#trainer").add_event_handler(Events.EPOCH_STARTED(once=1), first)
            get(f"run#{place}")
            note(CALLED.get(step, "training" if "trainer" in step else "the rest"))
        print(f"load {os.getloadavg()[0]:.1f}")
    whole = sum(seconds for seconds, _ in spent.values())
    for part, (seconds, clock) in spent.items():
        print(f"{part:42} {seconds:6.1f} s of the processor, {seconds / whole:4.0%}; {clock:6.1f} s by the clock")


if __name__ == "__main__":
    main()
