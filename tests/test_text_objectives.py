"""Objectives on encoders, through the command: trained, measured, predicted with and exported, as users would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused, settle_in
from labelled_texts import labelled_rows, save_labelled
from tiny_encoders import tiny_encoder, wordpiece_tokenizer
from transformers import AutoModel, AutoModelForMaskedLM

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

MODULES, DATA = "lightllm.modules", "lightllm.datamodules"

SHOTS = {"shots": 4, "val_rows": 10, "test_rows": 12}

RUNS: dict[str, dict[str, Any]] = {
    "masked": {
        "model": {"class_path": f"{MODULES}.MaskedPretraining", "init_args": {"masking": {"units": "words"}}},
        "data": {
            "class_path": f"{DATA}.TextData",
            "init_args": {"reads_end": True, "batches": {"mode": "packed", "tokens": 64}},
        },
    },
    "contrastive": {
        "model": {"class_path": f"{MODULES}.ContrastivePretraining", "init_args": {"rows_at_once": 4}},
        "data": {"class_path": f"{DATA}.PairData", "init_args": {"fields": ["text"], "label_field": "label"}},
    },
    "classification": {
        "model": {"class_path": f"{MODULES}.SequenceClassification", "init_args": {}},
        "data": {
            "class_path": f"{DATA}.ClassificationData",
            "init_args": SHOTS,
        },
    },
    "prototypes": {
        "model": {
            "class_path": f"{MODULES}.PrototypicalNetwork",
            "init_args": {"adapter": {"class_path": "lightllm.models.LinearProbe"}},
        },
        "data": {
            "class_path": f"{DATA}.ClassificationData",
            "init_args": SHOTS,
        },
    },
    "episodes": {
        "model": {"class_path": f"{MODULES}.PrototypicalNetwork", "init_args": {}},
        "data": {
            "class_path": f"{DATA}.EpisodeData",
            "init_args": {"ways": 2, "shots": 2, "queries": 2, "episodes": 6, "measured_episodes": 3},
        },
    },
}


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        tokenizer = wordpiece_tokenizer()
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(tmp_path / "network")
        network = tiny_encoder(task="encoder", vocab_size=len(tokenizer), hidden_dropout_prob=0.1)
        network.save_pretrained(tmp_path / "network")
        save_labelled(tmp_path / "rows.jsonl", labelled_rows(10, 10))
        yield tmp_path


def write_config(folder: Path, name: str) -> Path:
    recipe = json.loads(json.dumps(RUNS[name]))
    recipe["run"] = f"runs/{name}"
    recipe["trainer"] = {"max_epochs": 2, "log_every_n_steps": 1}
    network = {"class_path": "lightllm.models.Pretrained", "init_args": {"name": str(folder / "network")}}
    recipe["model"]["init_args"]["network"] = network
    given = {"train": str(folder / "rows.jsonl"), "max_length": 16}
    if name not in ("masked", "episodes"):
        given["batches"] = {"mode": "sorted", "documents": 8}
    recipe["data"]["init_args"] = given | recipe["data"]["init_args"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("name", list(RUNS))
def test_an_objective_from_configuration_to_export(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightllm("fit", "--config", write_config(workplace, name))
    run = f"runs/{name}"
    lightllm("validate", run)
    if name not in ("masked", "contrastive"):
        lightllm("test", run)
    if name in ("contrastive", "episodes"):
        assert refused(capsys, "predict", run)
    else:
        lightllm("predict", run)
        lines = [json.loads(line) for line in (workplace / run / "predictions.jsonl").read_text().splitlines()]
        assert lines
        assert all(line["loss"] > 0 and line["tokens"] >= 1 for line in lines)
    lightllm("export", run)
    folder = workplace / run / "export"
    kind = AutoModelForMaskedLM if name == "masked" else AutoModel
    loaded = kind.from_pretrained(folder)
    assert torch.isfinite(next(iter(loaded(input_ids=torch.full((1, 4), 7)).values()))).all()
    assert (folder / "modules.json").is_file() == (name != "masked")
    assert (folder / "classes.json").is_file() == (name in ("classification", "prototypes"))
    if name == "contrastive":
        assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 16
    lightllm("fit", "--resume", run, "--trainer.max_epochs", "3")
