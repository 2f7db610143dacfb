"""Hydra's launchers and sweepers work as they come: jobs in other processes, values from a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from flowerbed.experiments import cli, hydra_schema

QUICK = ["federation.clients=2", "federation.rounds=1", "local.steps=2", "model=linear", "run.figures=false"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def accuracies(folder: Path) -> list[float]:
    jobs = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    assert all(job["status"] == "completed" for job in jobs)
    return [job["accuracy"] for job in sorted(jobs, key=lambda job: job["number"])]


def test_a_schema_that_comes_back_from_another_process_is_whole() -> None:
    # What a launcher does with the results of its jobs, without the other process.
    cloudpickle = pytest.importorskip("cloudpickle")
    schema = hydra_schema.root_schema()
    before = OmegaConf.structured(schema)
    cloudpickle.loads(cloudpickle.dumps(before))
    assert OmegaConf.structured(schema) == before


@pytest.mark.slow
def test_jobs_in_other_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed (extra sweeps)"
    )
    assert cli.main(["simulate", "-m", *QUICK, "seed=0,1", "run.dir=here"]) == 0
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run.dir=there"]
    assert cli.main(["simulate", "-m", *QUICK, "seed=0,1", *parallel]) == 0
    assert accuracies(tmp_path / "there") == accuracies(tmp_path / "here")
    assert len(set(accuracies(tmp_path / "there"))) == 2


def test_a_search_sees_the_accuracy_of_its_jobs(tmp_path: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed (extra sweeps)"
    )
    search = [
        *("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4"),
        *("hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0", "local.lr=interval(0.001,0.5)"),
    ]
    assert cli.main(["simulate", "-m", *QUICK, *search, "run.dir=search"]) == 0
    found = accuracies(tmp_path / "search")
    assert len(found) == 4
    best = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(found)
    winner = tmp_path / "search" / str(found.index(max(found)))
    rate = yaml.safe_load((winner / "config.yaml").read_text())["local"]["lr"]
    assert best["best_params"] == {"local.lr": rate}
    assert 0.001 <= rate <= 0.5
