"""Finding the bundle, refusing misspelled options, claiming output folders, and running many jobs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from bundle_runs import REPOSITORY, refused
from monai.bundle import ConfigWorkflow

from medtl_ext import InputError
from medtl_ext.transfer import Job, bundle_root, config, jobs
from medtl_ext.transfer.jobs import run_jobs

CONFIG = {
    "imports": ["$import medtl_ext.transfer as transfer", "$from pathlib import Path", "$import os", "$import time"],
    "bundle_root": "$transfer.bundle_root()",
    "number": 3,
    "progress": True,
    "figures": True,
    "output_dir": "$@bundle_root + '/eval'",
    "initialize": ["$transfer.start()"],
    "run": [
        "$transfer.config.claim_output(@output_dir)",
        "$Path(@output_dir, 'result.txt').write_text(str(@number**2))",
    ],
}
LOGGING = "[loggers]\nkeys=root\n[handlers]\nkeys=\n[formatters]\nkeys=\n[logger_root]\nlevel=INFO\nhandlers=\n"
ONE_OR_TWO = "$1 if @choice is None else 2"


@pytest.fixture
def write(tmp_path):
    """Writes a bundle that saves the square of a number in result.txt; returns the path of its config."""

    def write_bundle(name: str = "", **extra) -> Path:
        configs = tmp_path / name / "configs"
        configs.mkdir(parents=True)
        files = {"metadata.json": "{}", "logging.conf": LOGGING, "train.json": json.dumps(CONFIG | extra)}
        for file, text in files.items():
            (configs / file).write_text(text)
        return configs / "train.json"

    return write_bundle


@pytest.fixture
def job(write, tmp_path):
    """Makes a job of an existing or a new bundle, in a folder with its name."""

    def make(name: str, overrides=(), result: str = "result.txt", **extra) -> Job:
        if not (tmp_path / "configs").exists():
            write()
        config = CONFIG | {"bundle_root": str(tmp_path)} | extra
        return Job(config, tmp_path / name, overrides=dict(overrides), result=result)

    return make


def run(config: Path, **overrides) -> ConfigWorkflow:
    workflow = ConfigWorkflow(config_file=str(config), workflow_type="train", **overrides)
    workflow.initialize()
    workflow.run()
    return workflow


def refusal(config: Path, **overrides) -> str:
    return refused(lambda: run(config, **overrides))


# Where it is


def test_the_root_is_found_from_anywhere(write, tmp_path, monkeypatch):
    result = write("a bundle").parent.parent / "eval" / "result.txt"
    for folder, path in {
        "": "a bundle/configs/train.json",
        "a bundle": "configs/train.json",
        "a bundle/configs": "train.json",
    }.items():
        monkeypatch.chdir(tmp_path / folder)
        run(Path(path))
        assert result.read_text() == "9"
        result.unlink()
    assert bundle_root() == str(tmp_path / "a bundle" / "configs")  # outside of a workflow: the current folder


# Options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("numbr", "option --numbr is not used by this bundle; did you mean --number?"),
        ("zzz", "see the bundle's docs"),
        ("images", "option --images has no effect here; it belongs to infer.json"),
    ],
)
def test_an_option_that_does_nothing_is_refused(option, message, write):
    config = write()
    (config.parent / "infer.json").write_text(json.dumps({"images": ".", "spacing": [1.0, 1.0], "output_dir": None}))
    assert message in refusal(config, **{option: 4})


def test_an_option_of_an_overlay_is_one(write):
    config = write()
    (config.parent / "plain.json").write_text(json.dumps({"colour": "grey"}))
    ConfigWorkflow(config_file=[str(config), str(config.parent / "plain.json")], colour="red").initialize()


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True), ("null", None), ("$1 + 1", 2)])
def test_options_are_read_as_json_words(text, value, write, tmp_path):
    workflow = run(write(choice=True, number=ONE_OR_TWO), choice=text)
    assert workflow.parser.get_parsed_content("choice") == value
    assert (tmp_path / "eval" / "result.txt").read_text() == ("1" if value is None else "4")


@pytest.mark.parametrize(
    ("declared", "given", "expected"),
    [
        (True, "no", "expected true or false"),
        (True, 1, "expected true or false"),
        (3, "many", "expected a whole number"),
        (3, 2.5, "expected a whole number"),
        (3, True, "expected a whole number"),
        (0.5, "x", "expected a number"),
        (0.5, [1], "expected a number"),
        ({"_target_": "x"}, 3, "a group of settings; give one of them, such as --choice#NAME"),
        (0.5, 1, None),
        (3, 4, None),
        (3, None, None),
        (True, "$1 > 2", None),
        ("text", 3, None),
    ],
)
def test_an_option_has_to_be_of_its_kind(declared, given, expected, write):
    config = write(choice=declared, number=ONE_OR_TWO)
    if expected is None:
        run(config, choice=given)
    else:
        assert re.search(f"option --choice is .*{re.escape(expected)}", refusal(config, choice=given))


@pytest.mark.parametrize(("name", "value", "least"), [("seed", -1, 0), ("epochs", -1, 0), ("batch_size", 0, 1)])
def test_a_number_that_makes_no_sense_is_refused(name, value, least, write):
    config = write(**{name: 2}, used=f"$@{name}")
    assert f"option --{name} is {value}; expected at least {least}." in refusal(config, **{name: value})
    run(config, **{name: max(least, 1)})


@pytest.mark.parametrize(
    ("epochs", "interval", "shown"),
    [
        (4, 10, (10, 4)),
        ("@pool_epochs", 4, (4, 3)),
        (4, "@number", (5, 4)),
        ("$2 + 2", 10, (10, 4)),
        (4, "$2 * @epochs", (8, 4)),
        (4, "@patience", None),
        (4, 4, None),
        (0, 10, None),
        (4, "@epochs", None),
        (None, 3, None),
    ],
)
def test_a_training_without_a_validation_is_refused(epochs, interval, shown, write):
    settings = {"epochs": epochs, "val_interval": interval, "pool_epochs": 3, "number": 5, "patience": None}
    config = write(**settings, used="$[@epochs, @val_interval, @pool_epochs, @patience]")
    if shown is None:
        run(config)
    else:
        message = (
            "--val_interval is {}, but --epochs is {}: no epoch would be validated; give --val_interval of at most {}."
        )
        assert refusal(config) == message.format(*shown, shown[1])


# Whose folder it is


@pytest.mark.parametrize(
    "part", ["network_def", "loss", "loss_def", "region_loss", "leep", "optimizer", "lr_scheduler", "early_stopping"]
)
def test_any_part_of_the_training_decides(part, write):
    config = write(**{part: {"base": {"_target_": "torch.nn.CrossEntropyLoss"}, "to": "$1 + 1"}})
    run(config)
    run(config)
    for change in ({f"{part}#base#_target_": "torch.nn.NLLLoss"}, {f"{part}#to": "$2"}):
        assert f"holds a run with {part}=" in refusal(config, **change)


def test_fitted_weights_are_known_by_their_content(write, tmp_path):
    config, files = write("bundle", affinity=None), [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text('{"alpha": 1}')
        run(config, affinity=str(file))
    files[0].write_text('{"alpha": 2}')
    assert "holds a run on another affinity, with other weights than" in refusal(config, affinity=str(files[0]))


def test_a_run_is_continued_but_never_overwritten_by_another(write, tmp_path):
    config, result = write(), tmp_path / "eval" / "result.txt"
    run(config)
    run(config)
    assert "holds a run with number=3, but this one has 4" in refusal(config, number=4)
    assert result.read_text() == "9"
    run(config, number=4, output_dir=str(tmp_path / "other"))
    assert (tmp_path / "other" / "result.txt").read_text() == "16"
    assert "cannot be written to" in refusal(config, output_dir=str(result / "eval"))  # below a file


def test_the_config_left_behind_can_be_run_again(write, tmp_path):
    run(write(), number=5)
    left = json.loads((tmp_path / "eval" / "config.json").read_text())
    Job(left, tmp_path / "again", result="result.txt").run()
    assert (tmp_path / "again" / "result.txt").read_text() == "25"


# Jobs


def test_jobs_run_once_and_a_bad_one_costs_itself_only(job, tmp_path):
    series = [job(name, {"number": number}) for name, number in {"one": 1, "bad": "x", "two": 2}.items()]
    with pytest.raises(InputError, match=r"1 of 3 runs failed; the first: .*bad") as caught:
        run_jobs(series, n_jobs=2)
    line = int(re.search(r" \(line (\d+) of its log\.txt\)", str(caught.value))[1])
    log = (tmp_path / "bad" / "log.txt").read_text().splitlines()
    assert log[line - 1].startswith("Traceback")
    assert "medtl_ext._validation.InputError: option --number is 'x'; expected a whole number." in log
    assert [one.done for one in series] == [True, False, True]
    before = (tmp_path / "one" / "result.txt").stat().st_mtime_ns
    run_jobs([series[0], series[2]])
    assert (tmp_path / "one" / "result.txt").stat().st_mtime_ns == before


def test_the_first_training_says_how_long_a_run_takes(job, caplog):
    said = "$print('500 training steps, about 1.4 minutes (0.17 s each)')"
    with caplog.at_level("INFO"):
        run_jobs([job("slow", run=[said, "$time.sleep(5)", *CONFIG["run"]])], description="pre-training")
    assert "pre-training: each run has 500 training steps, about 1.4 minutes" in caplog.messages[1]


def test_a_job_is_done_when_its_last_file_is_there(tmp_path):
    one = Job({}, tmp_path)
    (tmp_path / "model.pt").touch()  # of the best epoch so far
    assert not one.done
    (tmp_path / "metrics.csv").touch()
    assert one.done


@pytest.mark.parametrize("changed", ["table.csv", "words.json"])
def test_a_job_whose_tables_are_damaged_runs_again(job, tmp_path, changed):
    tables = [f"$Path(@output_dir, '{name}').write_text('17')" for name in ("table.csv", "words.json")]
    one = job("one", run=CONFIG["run"] + tables)
    run_jobs([one])
    assert one.done
    (tmp_path / "one" / changed).write_text("16")
    assert not one.done
    one.run()
    assert one.done
    assert (tmp_path / "one" / changed).read_text() == "17"
    (tmp_path / "one" / f".{changed}.5a0c-1-left").mkdir()  # by a killed process
    assert one.done
    (tmp_path / "one" / ".run.sums").unlink()  # as runs of before have none
    assert one.done


def test_a_damaged_record_of_a_run_is_one_line(write, tmp_path):
    run(write())
    (tmp_path / "eval" / "config.json").write_text('{"number": ')
    assert "config.json is not valid JSON" in refusal(tmp_path / "configs" / "train.json")


def test_a_failed_job_says_what_we_say_of_it(job, tmp_path):
    """Our error replaces torch's advice on a damaged file, which names no file and is dangerous."""
    (tmp_path / "net.pt").write_bytes(b"no checkpoint")
    step = f"$__import__('medtl_ext.networks').networks.read_weights({str(tmp_path / 'net.pt')!r})"
    with pytest.raises(InputError, match=rf"the first: .*checkpoint {tmp_path / 'net.pt'} cannot be read") as caught:
        run_jobs([job("one", run=[step])], n_jobs=1)
    assert "weights_only" not in str(caught.value)


def test_a_job_started_twice_at_a_time_runs_once(job, tmp_path, monkeypatch):
    """Each would delete the files that the other is writing. So the second waits, and then finds the job done."""
    log, said = tmp_path / "log.txt", []
    claim, square = CONFIG["run"]
    steps = [claim, f"$open({str(log)!r}, 'a').write('run\\n')", "$__import__('time').sleep(0.5)", square]
    monkeypatch.setattr(jobs.logger, "warning", lambda text, *values: said.append(text % values))
    with ThreadPoolExecutor(2) as pool:  # a file lock holds between threads as it does between processes
        for attempt in [pool.submit(job("one", run=steps).run) for _ in range(2)]:
            attempt.result(120)
    who = f"(process {os.getpid()} on {socket.gethostname()}|another process)"  # which has not said so yet
    assert re.fullmatch(rf"waiting for {who}, which is running {tmp_path / 'one'}", said.pop())
    assert said == []
    assert log.read_text() == "run\n"
    assert (tmp_path / "one" / "result.txt").read_text() == "9"
    other = job("one", {"number": 4}, result="other.txt", run=steps)  # the lock is no file of the run
    assert "holds a run with number=3" in refused(other.run)


def test_a_folder_in_use_is_refused_with_who_uses_it(write, tmp_path):
    here = {"_target_": "medtl_ext.transfer.Run", "output_dir": "@output_dir"}
    config = write(here=here, run=["$@here.start()", "$time.sleep(60)"])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for((tmp_path / "eval/config.json").is_file)
        said = refusal(config)
        assert f"eval is in use by process {first.pid} on {socket.gethostname()}; wait until it is done" in said
        first.kill()
    run(config, run=["$@here.start()"])


def test_a_folder_that_was_deleted_is_no_result(write):
    here = {"_target_": "medtl_ext.transfer.Run", "output_dir": "@output_dir"}
    steps = ["$@here.start()", "$shutil.rmtree(@output_dir)", "$@here.end()"]
    config = write(here=here, imports=[*CONFIG["imports"], "$import shutil"], run=steps)
    assert "eval was deleted during the run; run the same command again." in refusal(config)


def test_never_more_threads_than_cores(job, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs, "cpu_count", lambda: 4)
    monkeypatch.setattr("medtl_ext.transfer.config.cpu_count", lambda: 4)
    monkeypatch.setattr(jobs, "Parallel", lambda n, **_: lambda calls: asked.extend((n, *of[1]) for of in calls) or [])
    series = [job(str(number)) for number in range(9)]
    for n_jobs in (None, 1, 2, 3, 9):
        asked.clear()
        run_jobs(series, n_jobs=n_jobs)
        assert len(asked) == 9
        assert all(at_a_time * threads <= 4 for at_a_time, _, threads in asked)


NOTE = "$(Path(@output_dir) / 'pid').write_text(str(os.getpid()))"
SERIES = """
import json, sys
from pathlib import Path
from medtl_ext.transfer import Job
from medtl_ext.transfer.jobs import run_jobs

def run(folder):
    slow = json.loads(Path(__file__).with_name("slow.json").read_text())
    run_jobs([Job(slow, Path(folder, name), result="x") for name in "ab"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(write, tmp_path, monkeypatch, number):
    """A command that is stopped ends within ten seconds with all its workers, and prints one line if it can."""
    slow = CONFIG | {"bundle_root": str(tmp_path), "run": [CONFIG["run"][0], NOTE, "$time.sleep(600)"]}
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    (tmp_path / "series.py").write_text(SERIES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    config = write(imports=[*CONFIG["imports"], "$import series"], run=["$series.run(@output_dir)"])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    pids = [tmp_path / "eval" / name / "pid" for name in "ab"]
    wait_for(lambda: all(pid.is_file() and pid.read_text() for pid in pids))
    workers = [int(pid.read_text()) for pid in pids]
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=10)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"\nstopped by {number.name}; run the same command again to continue\n" in said
        assert "Traceback" not in said


@pytest.mark.slow
def test_dask_runs_jobs_and_outlives_a_worker(job, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    with pytest.raises(InputError, match="give --backend tcp://HOST:8786"):
        run_jobs([job("none")], backend="dask")
    steps = [CONFIG["run"][0], NOTE, "$time.sleep(2)", CONFIG["run"][1]]
    series = [job(str(number), {"number": number}, run=steps) for number in range(5)]
    two = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**two) as cluster, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_jobs, series, backend=cluster.scheduler_address)
        wait_for((first := tmp_path / "0/pid").is_file)
        os.kill(victim := int(first.read_text()), signal.SIGKILL)
        running.result(120)
    assert [(tmp_path / str(number) / "result.txt").read_text() for number in range(5)] == ["0", "1", "4", "9", "16"]
    assert first.read_text() not in (str(victim), str(os.getpid()))


EXAMPLES = REPOSITORY / "docs" / "examples"


@contextmanager
def started(*command: str, **environment: str):
    """A process that is ended as Ctrl-C would."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, *command], env=os.environ | environment, **how) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def on_a_cluster(job, tmp_path, address: str) -> list[str]:
    """Results of two jobs, and that they were not run here."""
    series = [job(str(number), {"number": number}, run=[CONFIG["run"][0], NOTE, CONFIG["run"][1]]) for number in (2, 3)]
    run_jobs(series, backend=address)
    assert str(os.getpid()) not in [(tmp_path / name / "pid").read_text() for name in "23"]
    return [(tmp_path / name / "result.txt").read_text() for name in "23"]


@pytest.mark.slow
def test_the_file_for_slurm_gives_a_cluster(job, tmp_path):
    """With a stand-in for SLURM that runs what it is given at once."""
    pytest.importorskip("dask_jobqueue")
    script = str(EXAMPLES / "slurm_cluster.py")
    with started(script, "--print", "--queue", "gpu", "--cores", "3", "--line=--gres=gpu:1") as process:
        said = process.communicate(timeout=60)[0]
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=3", "#SBATCH --gres=gpu:1", "export OMP_NUM_THREADS=3"):
        assert f"\n{line}\n" in said
    (tmp_path / "bin").mkdir()
    sbatch = '#!/bin/sh\ncp "$1" "$0.$$"\nsh "$0.$$" >"$0.$$.log" 2>&1 &\necho "Submitted batch job $!"\n'
    for name, text in (("sbatch", sbatch), ("scancel", '#!/bin/sh\nkill "$1"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    with started(script, "--workers", "2", "--cores", "1", "--memory", "2GB", "--port", "0", PATH=path) as process:
        backend, address = process.stdout.readline().split()
        assert backend == "--backend"
        assert on_a_cluster(job, tmp_path, address) == ["4", "9"]


@pytest.mark.slow
def test_the_file_for_kubernetes_gives_a_cluster(job, tmp_path):
    """By its own commands, on this machine; names and ports in it fit together."""
    pytest.importorskip("distributed")
    service, scheduler, worker, run_of = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    for part in (scheduler, worker):
        assert part["spec"]["selector"]["matchLabels"] == part["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == scheduler["spec"]["selector"]["matchLabels"]
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    begin, work, compare = (part["spec"]["template"]["spec"]["containers"][0] for part in (scheduler, worker, run_of))
    config, *options = (word.removeprefix("--").partition("=")[::2] for word in compare["args"])
    content = json.loads(Path(config[1].replace("/medtl", str(REPOSITORY))).read_text())
    assert {name.partition("#")[0] for name, _ in options} <= content.keys()
    assert dict(options)["backend"] == address
    assert address in work["command"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = f"tcp://127.0.0.1:{port}"
    commands = [
        [word.replace(address, here).replace("8786", port) for word in part["command"]] for part in (begin, work)
    ]
    with started("-m", *commands[0]), started("-m", *commands[1]):
        assert on_a_cluster(job, tmp_path, here) == ["4", "9"]


@pytest.mark.slow
def test_ray_runs_jobs(job, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        run_jobs([job(str(number), {"number": number}) for number in range(3)], backend="ray")
    finally:
        ray.shutdown()
    assert [(tmp_path / str(number) / "result.txt").read_text() for number in range(3)] == ["0", "1", "4"]


@pytest.mark.parametrize(("backend", "said"), [("ray", "pip install ray, on the workers too."), ("x", "backend: x")])
def test_a_backend_that_is_not_there_is_one_line(job, backend, said, monkeypatch):
    for name in ("ray", "ray.util.joblib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert said in refused(lambda: run_jobs([job("one")], backend=backend))


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    for place, name, value in ((config, "on_command_line", lambda: True), (config.signal, "signal", Mock())):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(sys, "excepthook", None)
    config._end_in_one_line()
    error = RuntimeError("Failed to evaluate an expression")
    error.__cause__ = OSError(28, "No space left on device")
    error.__cause__.__cause__ = RuntimeError("what a worker's traceback was")
    sys.excepthook(RuntimeError, error, None)
    assert capsys.readouterr().err.startswith("\nerror: [Errno 28] No space left on device; solve this")


def test_a_killed_worker_is_one_line(job):
    """The system kills a process that takes all memory; who it was is known by the folder that it held."""
    series = [job(name, run=[CONFIG["run"][0], "$os.kill(os.getpid(), 9)"]) for name in ("one", "two")]
    alone = r"one; alone: python .* --config_file .*one/config.json"
    what = rf"perhaps because memory ran out, while it ran .*{alone}; run the same command again, with a smaller --n_jo"
    with pytest.raises(InputError, match=what) as caught:
        run_jobs(series, n_jobs=1)
    assert "two" not in str(caught.value)


def test_a_job_without_memory_is_one_line(job, tmp_path):
    """What `ulimit -v` does not give is missed by Python, or by PyTorch."""
    for step, said in (("$bytearray(10**12)", "MemoryError"), ("$torch.empty(10**12)", "can't allocate memory")):
        steps = [CONFIG["run"][0], "$resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))", step]
        imports = [*CONFIG["imports"], "$import resource", "$import torch"]
        with pytest.raises(InputError) as caught:
            run_jobs([job(step[1:5], run=steps, imports=imports)], n_jobs=1)
        alone = rf"{step[1:5]}: out of memory \(.*{said}.*\); run the same command again with a smaller --n_jobs"
        assert re.search(alone + r".*\(line \d+ of its log.txt; alone: python .*\)$", str(caught.value))
        assert "\n" not in str(caught.value)


def test_a_clock_that_goes_back_changes_nothing(job, tmp_path):
    """What is done is known by its content: files may be from next year."""
    one = job("one", run=[*CONFIG["run"], "$Path(@output_dir, 'table.csv').write_text('17')"])
    run_jobs([one])
    for path in (tmp_path / "one").rglob("*"):
        os.utime(path, (time.time() + 10**8,) * 2)
    before = (tmp_path / "one/result.txt").stat().st_mtime_ns
    run_jobs([one])
    assert (tmp_path / "one/result.txt").stat().st_mtime_ns == before
    (tmp_path / "one/table.csv").write_text("18")  # older than the record of what it was
    run_jobs([one])
    assert (tmp_path / "one/table.csv").read_text() == "17"


def wait_for(true, seconds=240):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def test_a_folder_that_holds_nothing_but_the_lock_is_free(job, tmp_path):
    alone = r"one: division by zero \(line 1 of its log\.txt; alone: python .* --config_file .*one/config.json\)"
    with pytest.raises(InputError, match=alone):
        run_jobs([job("one", run=[CONFIG["run"][0], "$1 / 0"])])
    job("one", {"number": 5}).run()
    assert (tmp_path / "one" / "result.txt").read_text() == "25"
