"""Finding the bundle, refusing misspelled options, claiming output folders, and running many jobs."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundle_runs import refused
from monai.bundle import ConfigWorkflow

from medtl_ext.transfer import Job, bundle_root, jobs
from medtl_ext.transfer.jobs import run_jobs


def write_bundle(root: Path, **extra) -> Path:
    """A bundle that squares a number into result.txt."""
    configs = root / "configs"
    configs.mkdir(parents=True)
    config = {
        "imports": ["$import medtl_ext.transfer as transfer", "$from pathlib import Path"],
        "bundle_root": "$transfer.bundle_root()",
        "number": 3,
        "progress": True,
        "figures": True,
        "output_dir": "$@bundle_root + '/eval'",
        "initialize": ["$transfer.start()"],
        "run": [
            "$transfer.config.claim_output(@output_dir)",
            "$(Path(@output_dir) / 'result.txt').write_text(str(@number**2))",
        ],
    } | extra
    (configs / "train.json").write_text(json.dumps(config))
    (configs / "metadata.json").write_text("{}")
    (configs / "logging.conf").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=\n[formatters]\nkeys=\n[logger_root]\nlevel=INFO\nhandlers=\n"
    )
    return configs / "train.json"


def run(config: Path, **overrides):
    workflow = ConfigWorkflow(config_file=str(config), workflow_type="train", **overrides)
    workflow.initialize()
    workflow.run()
    return workflow


def refusal(config: Path, **overrides) -> str:
    return refused(lambda: run(config, **overrides))


def test_the_root_is_found_from_anywhere(tmp_path, monkeypatch):
    config = write_bundle(tmp_path / "a bundle")
    for folder, path in [
        (tmp_path, Path("a bundle/configs/train.json")),
        (tmp_path / "a bundle", Path("configs/train.json")),
        (tmp_path / "a bundle" / "configs", Path("train.json")),
    ]:
        monkeypatch.chdir(folder)
        run(path)
        assert (config.parent.parent / "eval" / "result.txt").read_text() == "9"
        (config.parent.parent / "eval" / "result.txt").unlink()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("numbr", r"option --numbr is not used by this bundle; did you mean --number\?"),
        ("zzz", "see the bundle's docs"),
    ],
)
def test_a_misspelled_option_names_the_nearest(tmp_path, option, message):
    assert re.search(message, refusal(write_bundle(tmp_path), **{option: 4}))


def test_an_option_of_another_config_is_refused_where_it_does_nothing(tmp_path):
    config = write_bundle(tmp_path)
    (config.parent / "infer.json").write_text(json.dumps({"images": ".", "spacing": [1.0, 1.0], "output_dir": None}))
    (config.parent / "plain.json").write_text(json.dumps({"colour": "grey"}))  # an overlay
    assert re.search(r"option --images does nothing here; it is one of infer\.json", refusal(config, images="there"))
    ConfigWorkflow(config_file=[str(config), str(config.parent / "plain.json")], colour="red").initialize()


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True), ("null", None), ("$1 + 1", 2)])
def test_options_are_read_as_json_words(tmp_path, text, value):
    workflow = run(write_bundle(tmp_path, choice=True, number="$1 if @choice is None else 2"), choice=text)
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
    ],
)
def test_an_option_of_another_kind_is_refused(tmp_path, declared, given, expected):
    assert re.search(
        f"option --choice is .*{expected}",
        refused(
            lambda: run(write_bundle(tmp_path, choice=declared, number="$1 if @choice is None else 2"), choice=given)
        ),
    )


@pytest.mark.parametrize(("declared", "given"), [(0.5, 1), (3, 4), (3, None), (True, "$1 > 2"), ("text", 3)])
def test_an_option_of_a_fitting_kind_is_taken(tmp_path, declared, given):
    run(write_bundle(tmp_path, choice=declared, number="$1 if @choice is None else 2"), choice=given)


@pytest.mark.parametrize(
    ("epochs", "interval", "shown"),
    [
        (4, 10, (10, 4)),
        ("@pool_epochs", 4, (4, 3)),
        (4, "@number", (5, 4)),
        (4, "@patience", None),
        (4, 4, None),
        (0, 10, None),
        ("$2 + 2", 10, None),
        (4, "$2 * @epochs", None),
        (4, "@epochs", None),
        (4, "@nothing", None),
        (None, 3, None),
        (4, "@val_interval", None),
    ],
)
def test_a_training_without_a_validation_is_refused(tmp_path, epochs, interval, shown):
    settings = {"epochs": epochs, "val_interval": interval, "pool_epochs": 3, "number": 5, "patience": None}
    config = write_bundle(tmp_path, **settings, used="$[@epochs, @val_interval, @pool_epochs, @patience]")
    workflow = ConfigWorkflow(config_file=str(config), workflow_type="train")
    if shown is None:
        workflow.initialize()
        return
    with pytest.raises(RuntimeError) as caught:
        workflow.initialize()
    message = "--val_interval is {}, --epochs {}: no epoch would be validated; give at most --epochs.".format(*shown)
    assert str(caught.value.__cause__) == message


def test_a_run_with_another_loss_is_another_run(tmp_path):
    loss = {"_target_": "torch.nn.CrossEntropyLoss"}
    config = write_bundle(tmp_path, loss=loss)
    run(config)
    run(config)
    assert re.search("holds a run with loss=", refusal(config, **{"loss#_target_": "torch.nn.NLLLoss"}))


@pytest.mark.parametrize(
    "part", ["loss", "loss_def", "region_loss", "leep", "optimizer", "lr_scheduler", "early_stopping"]
)
def test_any_part_of_the_training_decides(tmp_path, part):
    config = write_bundle(tmp_path, **{part: {"base": {"_target_": "torch.nn.CrossEntropyLoss"}, "to": "$1 + 1"}})
    run(config)
    run(config)
    for change in ({f"{part}#base#_target_": "torch.nn.NLLLoss"}, {f"{part}#to": "$2"}):
        assert f"holds a run with {part}=" in refusal(config, **change)


def test_fitted_weights_are_known_by_their_content(tmp_path):
    config = write_bundle(tmp_path / "bundle", affinity=None)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text('{"alpha": 1}')
    second.write_text('{"alpha": 1}')
    run(config, affinity=str(first))
    run(config, affinity=str(second))
    first.write_text('{"alpha": 2}')
    assert "holds a run on another affinity, with other weights than" in refused(
        lambda: run(config, affinity=str(first))
    )


def test_a_run_is_continued_but_never_overwritten_by_another(tmp_path):
    config = write_bundle(tmp_path)
    run(config)
    run(config)
    assert "holds a run with number=3, this one has 4" in refusal(config, number=4)
    assert (tmp_path / "eval" / "result.txt").read_text() == "9"
    run(config, number=4, output_dir=str(tmp_path / "other"))
    assert (tmp_path / "other" / "result.txt").read_text() == "16"


def test_an_output_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(
        lambda: run(write_bundle(tmp_path), output_dir=str(tmp_path / "file" / "eval"))
    )


def test_the_config_left_behind_can_be_run_again(tmp_path):
    run(write_bundle(tmp_path), number=5)
    left = json.loads((tmp_path / "eval" / "config.json").read_text())
    Job(left, tmp_path / "again", result="result.txt").run()
    assert (tmp_path / "again" / "result.txt").read_text() == "25"


def test_jobs_run_once_and_a_bad_one_costs_itself_only(tmp_path):
    config = json.loads(write_bundle(tmp_path).read_text()) | {"bundle_root": str(tmp_path)}
    jobs = [Job(config, tmp_path / name, overrides={"number": number}, result="result.txt") for name, number in
            [("one", 1), ("bad", "x"), ("two", 2)]]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed; the first: .*bad"):
        run_jobs(jobs, n_jobs=2)
    assert [job.done for job in jobs] == [True, False, True]
    before = (tmp_path / "one" / "result.txt").stat().st_mtime_ns
    run_jobs([jobs[0], jobs[2]])
    assert (tmp_path / "one" / "result.txt").stat().st_mtime_ns == before


def test_a_job_is_done_when_its_last_file_is_there(tmp_path):
    job = Job({}, tmp_path)
    (tmp_path / "model.pt").touch()  # of the best epoch so far
    assert not job.done
    (tmp_path / "metrics.csv").touch()
    assert job.done


def test_a_failed_job_says_what_we_say_of_it(tmp_path):
    """Not what the library said that found it: torch's advice on a damaged file names no file, and is dangerous."""
    (tmp_path / "net.pt").write_bytes(b"no checkpoint")
    step = f"$__import__('medtl_ext.networks').networks.read_weights({str(tmp_path / 'net.pt')!r})"
    config = json.loads(write_bundle(tmp_path, run=[step]).read_text()) | {"bundle_root": str(tmp_path)}
    with pytest.raises(RuntimeError, match=rf"the first: .*checkpoint {tmp_path / 'net.pt'} cannot be read") as caught:
        run_jobs([Job(config, tmp_path / "one", result="result.txt")], n_jobs=1)
    assert "weights_only" not in str(caught.value)


def test_a_job_started_twice_at_a_time_runs_once(tmp_path, monkeypatch):
    """Each would clear away what the other is writing; the second waits, and finds the job done."""
    log = tmp_path / "log.txt"
    steps = [
        "$transfer.config.claim_output(@output_dir)",
        f"$open({str(log)!r}, 'a').write('run\\n')",
        "$__import__('time').sleep(0.5)",
        "$(Path(@output_dir) / 'result.txt').write_text(str(@number**2))",
    ]
    config = json.loads(write_bundle(tmp_path, run=steps).read_text()) | {"bundle_root": str(tmp_path)}
    job = Job(config, tmp_path / "one", result="result.txt")
    said = []
    monkeypatch.setattr(jobs.logger, "warning", lambda text, *values: said.append(text % values))
    with ThreadPoolExecutor(2) as pool:  # a file lock holds between threads as it does between processes
        for attempt in [pool.submit(job.run) for _ in range(2)]:
            attempt.result(120)
    assert said == [f"waiting for another process, which is running {tmp_path / 'one'}"]
    assert log.read_text() == "run\n"
    assert (tmp_path / "one" / "result.txt").read_text() == "9"
    other = Job(config, tmp_path / "one", overrides={"number": 4}, result="other.txt")
    with pytest.raises(RuntimeError) as caught:  # the lock is no file of the run
        other.run()
    assert "holds a run with number=3" in str(caught.value.__cause__)


def test_a_folder_that_holds_nothing_but_the_lock_is_free(tmp_path):
    config = json.loads(write_bundle(tmp_path).read_text()) | {"bundle_root": str(tmp_path)}
    with pytest.raises(RuntimeError):
        Job(config | {"run": ["$1 / 0"]}, tmp_path / "one", result="result.txt").run()
    Job(config, tmp_path / "one", overrides={"number": 5}, result="result.txt").run()
    assert (tmp_path / "one" / "result.txt").read_text() == "25"


def test_outside_of_a_workflow_the_root_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundle_root() == str(tmp_path)
