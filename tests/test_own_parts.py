"""The example of `docs/`: an objective, data and a callback in a user's own files, named in a configuration."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import lightllm, refused, save_small_network, settle_in
from torch import nn

MODULES = ("own_objective", "own_data")


@pytest.fixture
def workplace(tmp_path: Path, root: Path) -> Iterator[Path]:
    """A copy of the example, with a small network beside it."""
    for name in (*(f"{module}.py" for module in MODULES), "own_parts.yaml", "glossary.jsonl"):
        shutil.copy(root / "docs" / name, tmp_path)
    save_small_network(tmp_path / "network")
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        yield tmp_path
    for module in MODULES:
        sys.modules.pop(module, None)


EXAMPLE = ["fit", "--config", "own_parts.yaml", "--model.network.name", "network"]


def test_own_parts_train_and_serve_every_later_command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightllm(*EXAMPLE, "--trainer.max_epochs", 2, "--trainer.callbacks.threshold", 0)
    with Path("runs/own_parts/metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses[1] < losses[0]
    lightllm("predict", "runs/own_parts")
    sources = [json.loads(line)["source"] for line in Path("runs/own_parts/predictions.jsonl").read_text().splitlines()]
    assert all(source.startswith("glossary.jsonl:") for source in sources)
    lightllm("export", "runs/own_parts")
    lightllm("generate", "runs/own_parts", "token: ", "--decoding.max_new_tokens", 2)
    assert "token: " in capsys.readouterr().out


def test_an_own_callback_ends_the_run(workplace: Path) -> None:
    lightllm(*EXAMPLE, "--trainer.max_epochs", 3, "--trainer.callbacks.threshold", 1000)
    with Path("runs/own_parts/metrics.csv").open() as file:
        assert sum(bool(row["val/loss"]) for row in csv.DictReader(file)) == 1


def test_an_own_objective_in_a_shipped_recipe(workplace: Path) -> None:
    own = ["--model", "own_objective.FocalTuning", "--model.gamma", 1.0, "--model.network.name", "network"]
    lightllm("fit", "--config", "finetune/lora.yaml", *own, "--data.reading.limit", 25, "--trainer.fast_dev_run", 1)


def test_own_data_refuses_rows_by_file_and_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("glossary.jsonl").read_text().splitlines()
    lines[4] = '{"term": "hidden state"}'
    Path("glossary.jsonl").write_text("\n".join(lines) + "\n")
    assert "glossary.jsonl:5: no meaning" in refused(capsys, *EXAMPLE)
    assert not Path("runs/own_parts").exists()


def test_a_mistake_in_own_parts_is_told_like_any_other(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, *EXAMPLE, "--model.gama", 1)
    assert told == "lightllm fit: model.gama: FocalTuning has no field 'gama' (did you mean 'gamma'?)"


def test_the_focal_loss_is_that_of_the_paper(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workplace))
    from own_objective import FocalTuning  # type: ignore[import-not-found]

    from lightllm.batch import IGNORE_INDEX
    from lightllm.models import Pretrained

    module = FocalTuning(Pretrained("network"), gamma=1.5)
    module.configure_model()
    tokens = torch.randint(3, 300, (2, 9))
    labels = tokens.roll(-1, 1)
    labels[:, -2:] = IGNORE_INDEX
    places = torch.arange(9).repeat(2, 1)
    batch = {"input_ids": tokens, "labels": labels, "position_ids": places, "document_ids": places * 0}
    total, weight = module.criterion(module(batch), batch)
    logits = module.network(tokens).logits
    log_p = -nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[
        labels.flatten() >= 0
    ]
    torch.testing.assert_close(total, -((1 - log_p.exp()) ** 1.5 * log_p).sum())
    assert weight == 14
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
