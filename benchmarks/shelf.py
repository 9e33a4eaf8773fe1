"""What a large shelf costs once its networks have run: scores, bootstrap and verdict, of made-up features.

    python benchmarks/shelf.py [--sources 100] [--patients 200]

Each source gives 300 features of 16 numbers a patient, which H-score and LogME are made of, and each is resampled 20
times over the patients. Prints seconds of the processor and the memory that this adds, for a quarter, a half and all of
the sources, then of the patients, each in a process of its own; and what the probabilities of all slices would hold,
which the scores of maps (LEEP, NCE, OTCE) keep of every source until the ranking is made.
"""

import argparse
import resource
import time
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from medtl_ext.metrics import HScore, LogME, PatientScores
from medtl_ext.ranking import bootstrap_ranking

FEATURES, PER_PATIENT, RESAMPLES = 16, 300, 20
SLICE_BYTES, SLICES = 2 * 96 * 96 * 4, 28  # of two classes, float32


def measure(sources: int, patients: int) -> dict[str, float]:
    torch.set_num_threads(1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    drawn, shelf = np.random.default_rng(0), {}
    labels = torch.arange(PER_PATIENT) % 2
    for source in range(sources):
        scores = PatientScores({"h_score": HScore(shrinkage="ledoit_wolf"), "logme": LogME()})
        for patient in range(patients):
            features = torch.from_numpy(drawn.normal(size=(PER_PATIENT, FEATURES)))
            features[:, 0] += labels * source / sources
            scores.update(features, labels, [str(patient)] * PER_PATIENT)
        shelf[f"source {source}"] = lambda counts, scores=scores: float(scores.resampled(counts)["h_score"])
    seen = time.process_time() - began
    ranking = bootstrap_ranking(shelf, patients=patients, n_resamples=RESAMPLES)
    best = ranking.table.index[0]
    return {
        "sources": sources,
        "patients": patients,
        "scores, s": seen,
        "ranking, s": time.process_time() - began - seen,
        "MB added": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "maps would hold, GB": sources * patients * SLICES * SLICE_BYTES / 1e9,
        "best": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=100)
    parser.add_argument("--patients", type=int, default=200)
    most = parser.parse_args()
    sizes = [(most.sources // part, most.patients) for part in (4, 2, 1)]
    sizes += [(most.sources, most.patients // part) for part in (4, 2)]
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(pd.DataFrame(pool.starmap(measure, sizes, chunksize=1)).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
