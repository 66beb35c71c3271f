from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightllm.runs import RunFolder, numbered


def save(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step}, path)


def begun(path: Path) -> RunFolder:
    run = RunFolder(path)
    assert run.begin("run: here\n")
    return run


def test_a_run_exists_once_it_is_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "lora")
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        run.require()
    assert run.begin("run: here\n")
    assert run.exists
    assert run.require() is run
    assert run.read_config() == {"run": "here"}


def test_a_folder_is_begun_once(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert not run.begin("run: there\n")
    assert run.read_config() == {"run": "here"}
    run.write_config("run: there\n")
    assert run.read_config() == {"run": "there"}
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"], "no temporary file stays"


def test_a_folder_is_begun_once_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", link)
    run = begun(tmp_path / "run")
    assert not run.begin("run: there\n")
    assert run.read_config() == {"run": "here"}
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]


def test_of_many_that_begin_at_once_each_gets_its_own(tmp_path: Path) -> None:
    def take(_: int) -> str:
        return next(run.path.name for run in numbered(str(tmp_path / "run")) if run.begin("run: here\n"))

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(take, range(8)))
    assert sorted(names) == ["run", *(f"run-{number}" for number in range(2, 9))]


def test_a_folder_that_holds_no_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert begun(tmp_path / "run").exists


def test_what_was_refused_at_the_start_leaves_no_trace(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.release()
    assert not run.path.exists()
    run.release()


@pytest.mark.parametrize("trace", ["metrics.csv", "checkpoints/step=1.ckpt"])
def test_what_has_trained_stays(tmp_path: Path, trace: str) -> None:
    run = begun(tmp_path / "run")
    save(run.path / trace, 1)
    run.release()
    assert run.config.exists()


def test_files_that_are_no_runs_own_stay_when_it_is_released(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run = begun(tmp_path / "run")
    run.release()
    assert [file.name for file in run.path.iterdir()] == ["notes.txt"]


def test_checkpoints_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run.checkpoint("best")
    for step in (2, 10):
        save(run.checkpoints / f"step={step}.ckpt", step)
    assert run.checkpoint("newest").name == "step=10.ckpt"
    assert run.checkpoint("best").name == "step=10.ckpt", "there was no validation"
    save(run.checkpoints / "best.ckpt", 2)
    assert run.checkpoint("best").name == "best.ckpt"
    file = str(run.checkpoints / "step=2.ckpt")
    assert run.checkpoint(file) == Path(file)
    with pytest.raises(ValueError, match="no checkpoint 'newset': give best, newest or a file"):
        run.checkpoint("newset")


def test_where_things_are() -> None:
    run = RunFolder("runs/a")
    assert run.predictions == Path("runs/a/predictions.jsonl")
    assert (run.tokenizer, run.export) == (Path("runs/a/tokenizer"), Path("runs/a/export"))


def test_whole_models_in_the_folder_are_exports(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    for name in ("export", "thin", "adapter", "checkpoints", "tokenizer"):
        (run.path / name).mkdir()
    for name in ("export/config.json", "export/model.safetensors", "thin/config.json", "thin/model-1.safetensors"):
        (run.path / name).touch()
    for name in ("thin/model-2.safetensors", "adapter/adapter_model.safetensors", "tokenizer/config.json", "q.gguf"):
        (run.path / name).touch()
    assert [path.name for path in run.whole_exports] == ["export", "q.gguf", "thin"]


def test_a_folder_that_is_given_back_keeps_no_ledger(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.ledger.write_text("{}\n")
    run.release()
    assert not run.path.exists()
