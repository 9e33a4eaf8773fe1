"""python -m medtl_ext: what there is and what options mean, as the bundles themselves say; and the index over runs."""

import json
from pathlib import Path

import pytest
from bundle_runs import ALL, RISK_MAP, refused

from medtl_ext.__main__ import files, main, options, settings
from medtl_ext.report import main as report
from medtl_ext.report import row_of, write_index


def test_it_lists_every_bundle_with_its_question_and_command(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    for bundle in ALL:
        assert f"python -m medtl_ext {bundle.name} --help" in said
        assert f"bundles/{bundle.name}/configs/train.json" in said
    assert said.count("?") >= len(ALL)
    assert "A source (--source, --sources) is" in said
    assert all(f"python -m medtl_ext.{name}" in said for name in ("data", "report"))


@pytest.mark.parametrize("bundle", ALL, ids=str)
def test_options_are_those_of_the_config(bundle):
    """A row of the README's table that no config knows, or whose default is another, would mislead."""
    found = list(options(bundle.root))
    known = set().union(*(json.loads(path.read_text()) for path in bundle.configs.glob("*.json")))
    names = [name.strip("-, ") for row, _ in found for name in row.split("  (default")[0].split()]
    assert len(names) > 15
    assert [name for name in names if name.split("#")[0] not in known] == []
    assert all(meaning and "](" not in meaning and "`" not in row + meaning for row, meaning in found)


def test_defaults_are_read_from_the_config(capsys):
    assert main([RISK_MAP.name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"--seed  (default: {RISK_MAP.content('train')['seed']})" in said
    assert f"--target_task  (default: {RISK_MAP.content('train')['target_task']})" in said


EACH_CONFIG = [
    pytest.param(bundle, path.stem, id=f"{bundle}-{path.stem}")
    for bundle in ALL
    for path in sorted(bundle.configs.glob("*.json"))
    if path.stem not in ("metadata", "train")
]


@pytest.mark.parametrize(("bundle", "config"), EACH_CONFIG)
def test_the_settings_of_every_config_are_shown_with_their_values(bundle, config, capsys):
    assert main([bundle.name, config, "--help"]) == 0
    said, content = capsys.readouterr().out, bundle.content(config)
    for name in files(bundle.root, config):
        assert f"bundles/{bundle.name}/configs/{name}.json" in said.splitlines()[0]
    plain = {name: value for name, value in content.items() if isinstance(value, int | float) and name[0] not in "_+"}
    assert [name for name, value in plain.items() if f"--{name}  (default: {json.dumps(value)})" not in said] == []


@pytest.mark.parametrize("config", ["compare", "matrix", "figure2", "study", "across", "paper_study", "fit"])
def test_every_option_of_a_study_is_explained(config):
    (bundle, *_) = [bundle for bundle in ALL if (bundle.configs / f"{config}.json").is_file()]
    without = {name.split()[0] for name, meaning in settings(bundle.root, config) if not meaning}
    assert without <= {"--tasks", "--sources", "--targets"}  # of matrix, which its pairs are made of


def test_a_config_that_a_bundle_does_not_have_is_refused_with_those_it_has(capsys):
    with pytest.raises(SystemExit):
        main([RISK_MAP.name, "compares"])
    assert "compare" in capsys.readouterr().err


# The index over runs


@pytest.fixture
def runs(tmp_path) -> Path:
    """A run with an audit, with an arm that is part of it; one that is cut off; one of another kind."""
    one = tmp_path / "a" / "one"
    (one / "audit" / "full").mkdir(parents=True)
    config = {"bundle_root": "bundles/risk_map", "target_task": "17-T2-ED"}
    for folder in (one, one / "audit" / "full"):
        (folder / "config.json").write_text(json.dumps(config))
        (folder / ".run.minutes").write_text("3.5")
    audit = {"text": "Fine-tune with full: it is ahead. More.", "tables": {"test": [{"arm": "full", "mean": 0.71234}]}}
    (one / "audit.json").write_text(json.dumps(audit))
    (one / "report.html").write_text('<title>A &amp; B</title>\n<p class="question">Which?</p>')
    for name, texts in {"cut": {"settings.json": "{", "audit.json": "{"}, "ranked": {"config.json": "{}"}}.items():
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "ranked" / "truth.csv").write_text("source,auc\nb,0.9\na,0.8\n")
    return tmp_path


def test_a_row_says_what_was_asked_advised_and_best(runs):
    row = row_of(runs / "a" / "one", runs)
    assert row.pop("begun")
    expected = {"link": "a/one/report.html", "run": "a/one", "asked": "A & B. Which?", "bundle": "risk_map"}
    expected |= {"target": "17-T2-ED", "advised": "Fine-tune with full: it is ahead."}
    assert row == expected | {"best on test": "full", "test Dice": "0.712", "test AUC": "", "minutes": "3.5"}
    other = row_of(runs / "ranked", runs)
    assert (other["best on test"], other["test AUC"], other["minutes"]) == ("b", "0.900", "")


def test_every_run_is_listed_once_with_what_there_is(runs):
    page = write_index(runs).read_text()
    assert page.count("<tr>") == 1 + 3
    assert '<th scope="col">test AUC</th>' in page
    (runs / "ranked" / "truth.csv").unlink()
    assert "test AUC" not in write_index(runs).read_text()  # no run has one
    assert "a/one/audit" not in page
    assert write_index(runs).is_file()  # once more


def test_no_runs_and_pages_of_others_are_refused(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no run in or below" in refused(lambda: write_index(tmp_path / "empty"))
    (runs / "index.html").write_text("my page")
    assert "is not replaced" in refused(lambda: write_index(runs))
    assert report([str(runs)]) == 2
    assert "index.html" in capsys.readouterr().err
