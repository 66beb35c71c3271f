from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_run import TinyModule, tiny_batches, tiny_loader, tiny_trainer
from wandb_file import read_offline_run

from lightllm.callbacks import SampleGenerations
from lightllm.generate import Decoding, generate
from lightllm.loggers import loggers, tensorboard_logger

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

PROMPTS: Any = ["The whale", [{"role": "user", "content": "Ünïcode?"}]]
SHORT = Decoding(max_new_tokens=5)


class Talking(TinyModule):
    """A tiny module with a tokenizer, and dropout, so that every random number counts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(tiny_llama().train())
        self.tokenizer = tiny_tokenizer()
        self.dropout = torch.nn.Dropout(0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        return {
            **outputs,
            "loss": outputs["loss"] + self.dropout(torch.ones(4)).sum() * self.network.lm_head.weight[0, 0],
        }


def fit(folder: Path, callbacks: list[Any], logger: list[Logger] | None = None, **fields: Any) -> Talking:
    module = Talking()
    trainer = tiny_trainer(folder, callbacks, logger, max_steps=4, val_check_interval=2, **fields)
    trainer.fit(module, tiny_loader(tiny_batches(4)), tiny_loader(tiny_batches(1)))
    return module


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_of_every_validation(tmp_path: Path) -> None:
    module = fit(tmp_path, [SampleGenerations(PROMPTS, SHORT)])
    found = lines(tmp_path)
    assert [row["step"] for row in found] == [2, 2, 4, 4]
    assert found[0]["prompt"] == "The whale"
    assert json.loads(found[1]["prompt"]) == PROMPTS[1]
    last = generate(module.network, module.tokenizer, PROMPTS, SHORT)
    assert [row["completion"] for row in found[2:]] == last


@pytest.mark.parametrize("decoding", [SHORT, Decoding(max_new_tokens=5, temperature=1.0)])
def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, decoding: Decoding) -> None:
    torch.manual_seed(5)
    without = fit(tmp_path / "a", [])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    samples = fit(tmp_path / "b", [SampleGenerations(PROMPTS, decoding)])
    assert torch.equal(drawn, torch.rand(1))
    assert all(map(torch.equal, without.parameters(), samples.parameters()))
    assert samples.network.training
    assert len(lines(tmp_path / "b")) == 4


def test_lines_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    old = [{"step": step, "prompt": "p", "completion": "c"} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in old) + '{"step": 4, "pro'
    (tmp_path / "samples.jsonl").write_text(text)
    fit(tmp_path, [SampleGenerations(PROMPTS, SHORT)])
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 2, 4, 4]


def test_nothing_before_training_nor_when_validating(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [SampleGenerations(PROMPTS, SHORT)])
    trainer.validate(Talking(), tiny_loader(tiny_batches(1)))
    assert not (tmp_path / "samples.jsonl").exists()
    fit(tmp_path, [SampleGenerations(PROMPTS, SHORT)], num_sanity_val_steps=1)
    assert [row["step"] for row in lines(tmp_path)] == [2, 2, 4, 4]


def test_tensorboard_gets_the_text(tmp_path: Path) -> None:
    module = fit(tmp_path, [SampleGenerations(PROMPTS, SHORT)], [tensorboard_logger(tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = events.Tensors("samples/text_summary")
    assert [text.step for text in texts] == [2, 4]
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert "    The whale\n" in shown
    answer = generate(module.network, module.tokenizer, PROMPTS, SHORT)[0]
    assert "".join(f"    {line}\n" for line in answer.split("\n")) in shown


def test_an_offline_wandb_run_holds_curves_table_and_configuration(tmp_path: Path) -> None:
    module = Talking()
    made = loggers(["wandb"], tmp_path)
    for logger in made:
        logger.log_hyperparams({"model": {"network": {"layers": 2}}, "seed": 7})
    trainer = tiny_trainer(tmp_path, [SampleGenerations(PROMPTS, SHORT)], made, max_steps=4, val_check_interval=2)
    trainer.fit(module, tiny_loader(tiny_batches(4)), tiny_loader(tiny_batches(1)))
    wandb.finish()
    wandb.teardown()  # the file is whole once W&B's own process has ended

    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    (path,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    run = read_offline_run(path)
    assert run.id == run_id
    assert run.config["model"] == {"network": {"layers": 2}}
    assert run.config["seed"] == 7
    curve = {row["trainer/global_step"]: row["train/loss"] for row in run.history if "train/loss" in row}
    metrics = (tmp_path / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("train/loss")
    assert curve == {int(line.split(",")[0]): float(line.split(",")[column]) for line in metrics[1:]}
    assert sorted(curve) == [0, 1, 2, 3]
    assert [row["trainer/global_step"] for row in run.history if "val/loss" in row] == [1, 3]

    tables = [row for row in run.history if row.get("samples._type") == "table-file"]
    assert [table["trainer/global_step"] for table in tables] == [2, 4]
    table = json.loads((path.parent / "files" / tables[-1]["samples.path"]).read_text())
    assert table["columns"] == ["step", "prompt", "completion"]
    assert table["data"] == [[row["step"], row["prompt"], row["completion"]] for row in lines(tmp_path)[2:]]


def test_a_network_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    module = Talking()
    module.tokenizer = None  # type: ignore[assignment]
    trainer = tiny_trainer(tmp_path, [SampleGenerations(PROMPTS, SHORT)], max_steps=1)
    with pytest.raises(ValueError, match="neither the data nor the network has one"):
        trainer.fit(module, tiny_loader(tiny_batches(1)), tiny_loader(tiny_batches(1)))
    with pytest.raises(ValueError, match="prompts is empty"):
        SampleGenerations([])
