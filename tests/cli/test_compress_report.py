from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from command_line import lightllm, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightllm.cli.rebuild import rebuild_data
from lightllm.compression.ledger import Ledger, LedgerRow
from lightllm.evaluate import evaluate_text
from lightllm.runs import RunFolder

LEDGER = {"class_path": "lightllm.callbacks.CompressionLedger", "init_args": {"limit": 3, "generation": False}}


def rows(run: str = "run") -> list[LedgerRow]:
    return Ledger(RunFolder(run).ledger).rows


@pytest.fixture
def run(material: Any, workplace: Path) -> Path:
    """A copy of the run, which has no ledger."""
    return Path(shutil.copytree(material.run, workplace / "run"))


def test_a_run_without_a_ledger_gets_one_with_its_exports(
    run: Path, material: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lightllm("export", "run")
    assert "What compression cost" not in capsys.readouterr().out, "an export fills in a ledger, and begins none"
    lightllm("export", "run", "--format", "gguf", "--gguf_type", "Q8_0")
    lightllm("compress-report", "run")
    told = capsys.readouterr().out
    assert "What compression cost" in told
    assert [row.key for row in rows()] == [("dense", 0), ("trained", 4), ("export", None), ("export.gguf", None)]
    dense, trained, merged, gguf = rows()
    assert all(row.tokens_per_second and row.peak_memory for row in rows())
    assert len({row.target_tokens for row in rows()}) == 1
    assert merged.weight_bytes == (run / "export/model.safetensors").stat().st_size
    assert gguf.weight_bytes == (run / "export.gguf").stat().st_size
    tensors = load_file(run / "export/model.safetensors")
    assert merged.parameters == trained.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert merged.loss == pytest.approx(trained.loss, rel=1e-5)
    assert gguf.loss == pytest.approx(trained.loss, rel=1e-2)
    assert dense.loss is not None
    assert trained.loss is not None
    assert dense.loss > trained.loss

    network = AutoModelForCausalLM.from_pretrained(run / "export")
    batches = rebuild_data(RunFolder(run)).excerpt("val", 64)
    expected = evaluate_text(network, None, batches)
    assert merged.loss == pytest.approx(expected.loss, rel=1e-6)
    assert merged.target_tokens == expected.num_tokens

    records = json.loads((run / "ledger.json").read_text())
    assert [record["step"] for record in records] == [row.step for row in rows()]
    assert records[3]["weight_bytes_ratio"] == pytest.approx(gguf.weight_bytes / dense.weight_bytes)
    assert records[1]["loss_increase"] == pytest.approx(trained.loss - dense.loss)
    with (run / "ledger.csv").open() as file:
        assert [float(row["weight_bytes"]) for row in csv.DictReader(file)] == [row.weight_bytes for row in rows()]
    assert (run / "ledger.md").read_text().count("\n") == 2 + 4
    texts = {one.text for one in ElementTree.parse(run / "quality_against_size.svg").iter()}
    assert {"dense", "trained", "export", "export.gguf"} <= texts


def test_an_export_of_a_run_with_a_ledger_is_a_row(
    material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(material.recipe.read_text())
    config["trainer"]["callbacks"] = [LEDGER]
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    lightllm("fit", "--config", "recipe.yaml", "--run", "run")
    assert [row.key for row in rows()] == [("dense", 0), ("trained", 4)]
    capsys.readouterr()
    lightllm("export", "run", "--checkpoint", "newest")
    told = capsys.readouterr().out
    assert told.index("written: run/export") < told.index("What compression cost")
    dense, trained, merged = rows()
    assert merged.step == "export"
    assert merged.loss == pytest.approx(trained.loss, rel=1e-5)
    assert merged.target_tokens == trained.target_tokens, "measured on the documents of the run's ledger"

    # Exported again, it is the same row; an export that is gone has none; one elsewhere never had one.
    lightllm("export", "run", "--dtype", "bfloat16")
    assert len(rows()) == 3
    assert rows()[2].weight_bytes < 0.6 * merged.weight_bytes
    lightllm("export", "run", "--to", "elsewhere")
    assert len(rows()) == 3
    (Path("run") / "export").rename("moved")
    lightllm("compress-report", "run")
    assert rows() == [dense, trained]


def test_a_distilled_run_has_its_teacher_as_a_row(material: Any, workplace: Path) -> None:
    config = yaml.safe_load(material.recipe.read_text())
    arguments = config["model"]["init_args"]
    config["model"] = {
        "class_path": "lightllm.modules.Distillation",
        "init_args": {
            "network": {
                "class_path": "lightllm.models.EveryNthLayer",
                "init_args": {"name": str(material.network), "step": 2},
            },
            "teacher": arguments["network"],
            "optimizer": arguments["optimizer"],
        },
    }
    config["trainer"]["callbacks"] = [LEDGER]
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    lightllm("fit", "--config", "recipe.yaml", "--run", "run", "--trainer.max_steps", "1")
    taken = rows()
    assert [row.key for row in taken] == [("dense", 0), ("teacher", 0), ("trained", 1)]
    RunFolder("run").ledger.unlink()
    lightllm("compress-report", "run")
    assert rows() == taken, "afterwards as during the run"


def test_the_documents_of_a_run_are_found_without_tokenising_them_again(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = torch.get_rng_state()
    data = rebuild_data(RunFolder("run"))
    assert len(data.val_documents) == 4
    assert "tokenising" not in caplog.text
    assert torch.equal(torch.get_rng_state(), place)


def test_mistakes_are_told(workplace: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run is missing\nusage: lightllm compress-report RUN" in refused(capsys, "compress-report")
    assert "'nothing' is not a run folder" in refused(capsys, "compress-report", "nothing")
    assert "no checkpoint 'bset'" in refused(capsys, "compress-report", "run", "--checkpoint", "bset")
