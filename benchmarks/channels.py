"""Time and memory a patient of one channel and of four, read and prepared as the bundles do.

    python benchmarks/channels.py

Target: four channels cost at most four times what one costs; the row ``NibabelReader`` is MONAI's own reader on one.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

TASKS = {
    "NibabelReader": ("17-T1-FeTS", "NibabelReader"),
    "one channel": ("17-T1-FeTS", "medtl_ext.data.ChannelReader"),
    "four channels": ("17-T1+T1CE+T2+FLAIR-FeTS", "medtl_ext.data.ChannelReader"),
}
REPEATS = 10


def measure(task: str, reader: str) -> dict[str, float]:
    """Seconds a patient, and megabytes that the process grew by, with the transforms of ``risk_map``."""
    from monai.bundle import ConfigParser
    from monai.transforms import Compose

    from medtl_ext.transfer import SegmentationTask

    target = SegmentationTask(task)
    config = Path(__file__).parent.parent / "bundles/risk_map/configs/train.json"
    parser = ConfigParser(json.loads(config.read_text()) | {"target": target})
    parser["train#deterministic_transforms"][0]["reader"] = reader
    prepare = Compose(parser.get_parsed_content("train#deterministic_transforms"))
    items = target.datalist("train")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = float("inf")
    for _ in range(REPEATS):  # the quickest counts: others may work on the machine
        start = time.perf_counter()
        for item in items:
            prepare(dict(item))
        seconds = min(seconds, (time.perf_counter() - start) / len(items))
    return {"seconds": seconds, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*TASKS[sys.argv[1]])))
        sys.exit()
    for name in TASKS:  # each in a process of its own, whose memory starts from nothing
        found = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
        row = json.loads(found.splitlines()[-1])
        print(f"{name:15} {1000 * row['seconds']:7.1f} ms a patient, {row['megabytes']:6.1f} MB more at the peak")
