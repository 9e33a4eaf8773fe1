"""Workers on SLURM for the trainings of a bundle: start this on the login node, and leave it running.

    pip install 'medtl[dask]'
    python docs/examples/slurm_cluster.py --queue gpu --workers 8 --line=--gres=gpu:1

Then, in another shell: python -m monai.bundle run --config_file ... --backend tcp://HOST:8786, as it prints. With
``--print`` it shows the script of a worker and ends, which needs no SLURM. Ctrl-C gives the workers back.
"""

import argparse
import signal
from contextlib import suppress

from dask_jobqueue import SLURMCluster

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", help="SLURM's partition")
    parser.add_argument(
        "--workers", type=int, default=4, help="jobs of SLURM, each of which trains one network at a time"
    )
    parser.add_argument("--cores", type=int, default=4, help="of a worker")
    parser.add_argument("--memory", default="16GB", help="of a worker")
    parser.add_argument("--walltime", default="12:00:00")
    parser.add_argument("--line", action="append", default=[], help="another line of #SBATCH")
    parser.add_argument("--port", type=int, default=8786)
    parser.add_argument("--print", action="store_true")
    given = parser.parse_args()
    with SLURMCluster(
        queue=given.queue,
        cores=1,  # trainings at a time; how many cores each has is said below
        processes=1,
        job_cpu=given.cores,
        memory=given.memory,
        walltime=given.walltime,
        job_extra_directives=given.line,
        job_script_prologue=[f"export OMP_NUM_THREADS={given.cores}"],
        scheduler_options={"port": given.port, "dashboard_address": ":0"},
    ) as cluster:
        if given.print:
            print(cluster.job_script())
        else:
            cluster.scale(jobs=given.workers)
            print(f"--backend {cluster.scheduler_address}", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                signal.pause()
