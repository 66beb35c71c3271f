"""Structured pruning in whole runs of the command: trained, killed, resumed, measured, exported."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from killable_run import Pace, logged_steps, wait_until_training
from tiny_objective import Batches, adamw, cut, documents, scratch
from tiny_run import tiny_trainer
from transformers import AutoModelForCausalLM

from lightllm.batch import TextBatch
from lightllm.callbacks import StructuredPruning
from lightllm.cli import main
from lightllm.cli.rebuild import load
from lightllm.compression.structure import Sizes, structure_of
from lightllm.compression.structured import prune
from lightllm.compression.structured_sizes import Removal
from lightllm.models import Pretrained
from lightllm.models.network import BuildRequest
from lightllm.modules import Distillation, FineTuning

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

PRUNING = {"layers": 1, "heads": 0.5, "neurons": 20, "channels": 8, "num_documents": 6}
SIZES = {
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "num_attention_heads": 2,
    "intermediate_size": 28,
    "hidden_size": 24,
    "head_dim": 8,
}


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small network, and a folder to work in."""
    settle_in(tmp_path / "work", monkeypatch)
    return save_small_network(tmp_path / "network")


def write_config(network: Path, adapter: str, distilled: bool, **pruning: Any) -> Path:
    """A run of eight steps."""
    dense = {"class_path": "lightllm.models.Pretrained", "init_args": {"name": str(network), "dtype": "float32"}}
    parts: dict[str, Any] = {"network": dense, "adapter": {"class_path": f"lightllm.models.{adapter}"}}
    config = {
        "run": "run",
        "trainer": {
            "max_steps": 8,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "val_check_interval": 4,
            "callbacks": [{"class_path": "lightllm.callbacks.StructuredPruning", "init_args": PRUNING | pruning}],
        },
        "checkpoint": {"every_n_train_steps": 1},
        "model": {
            "class_path": f"lightllm.modules.{'Distillation' if distilled else 'FineTuning'}",
            "init_args": parts | ({"teacher": dense} if distilled else {}),
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {
                "train": str(save_chats(network.parent / "train.jsonl", 40)),
                "val": str(save_chats(network.parent / "val.jsonl", 6)),
                "max_length": 128,
                "batches": {"documents": 4},
            },
        },
    }
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def checkpoint(run: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)
    return state


def killed_and_resumed(config: Path, run: str) -> None:
    """A run that is killed after a few steps, and goes on."""

    def train() -> None:
        warnings.simplefilter("ignore")
        pace = [f"--trainer.callbacks+={Pace.__module__}.{Pace.__name__}"]
        sys.exit(main(["fit", "--config", str(config), "--run", run, *pace]))

    process = get_context("fork").Process(target=train)
    process.start()
    wait_until_training(process, Path(run), steps=3)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 3 <= logged_steps(Path(run)) < 8
    lightllm("fit", "--resume", run)


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_run_resumes_as_if_it_had_not_been_killed_and_exports_a_smaller_network(
    network: Path, adapter: str, distilled: bool
) -> None:
    config = write_config(network, adapter, distilled)
    lightllm("fit", "--config", config, "--run", "whole")
    killed_and_resumed(config, "killed")
    whole, killed = checkpoint("whole"), checkpoint("killed")
    assert whole["state_dict"].keys() == killed["state_dict"].keys()
    assert all(torch.equal(killed["state_dict"][name], value) for name, value in whole["state_dict"].items())
    records = [one["transformations"]["StructuredPruning"] for one in (whole, killed)]
    assert all(torch.equal(records[0][name], records[1][name]) for name in records[0])
    names = set(whole["state_dict"])
    if adapter == "LoRA":  # the others are cut out of the pretrained network again
        assert names
        assert all("lora_" in name for name in names)
    assert not any(name.startswith("teacher") for name in names)

    lightllm("export", "killed")
    trained = load("killed").network  # of the same checkpoint, the best
    loaded = AutoModelForCausalLM.from_pretrained("killed/export").eval()
    said = json.loads(Path("killed/export/config.json").read_text())
    assert {name: said[name] for name in SIZES} == SIZES
    tokens = torch.randint(300, (2, 12))
    lightllm("validate", "killed")
    trained_logits = trained(tokens, use_cache=False).logits
    torch.testing.assert_close(loaded(tokens).logits, trained_logits, rtol=1e-5, atol=1e-5)

    # It is a pretrained network like any other: also a student.
    built = Pretrained("killed/export").build(BuildRequest("causal", None))
    assert structure_of(built).sizes == Sizes(layers=1, heads=1, neurons=28, channels=24)


def test_the_teacher_stays_whole(tmp_path: Path, network: Path) -> None:
    whole = Pretrained(str(network), dtype="float32")
    module = Distillation(whole, teacher=whole, optimizer=adamw())
    callback = StructuredPruning(parameters=0.3, heads=1, importance="magnitude")
    trainer = tiny_trainer(tmp_path / "fit", [callback], max_steps=2)
    trainer.fit(module, Batches(cut(documents(), [4, 4, 4])))
    dense = whole.build(BuildRequest("causal", None)).state_dict()
    teacher = module.built_teacher.state_dict()
    assert teacher.keys() == dense.keys()
    assert all(torch.equal(teacher[name], value) for name, value in dense.items())
    left = sum(one.numel() for one in module.built_network.parameters())
    assert left / sum(one.numel() for one in module.built_teacher.parameters()) == pytest.approx(0.7, abs=0.01)
    student = structure_of(module.built_network).sizes
    assert (student.layers, student.heads, student.channels) == (2, 1, 32)


def test_what_is_done_is_said_and_what_is_measured_is_the_runs_data(
    network: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Data(Batches):
        asked: ClassVar[list[int]] = []

        def calibration_batches(self, num_documents: int, seed: int = 0) -> list[TextBatch]:
            self.asked.append(num_documents)
            return self.train[:1]

    data = Data(cut(documents(), [4, 4, 4]))
    module = FineTuning(Pretrained(str(network), dtype="float32"), optimizer=adamw())
    callback = StructuredPruning(neurons=0.5, num_documents=5)
    with caplog.at_level("INFO"):
        tiny_trainer(network.parent, [callback], max_steps=1).fit(module, datamodule=data)
    assert data.asked == [5]
    dense = Pretrained(str(network), dtype="float32").build(BuildRequest("causal", None))
    kept = prune(dense, Removal(neurons=0.5), "activation", data.train[:1])
    assert torch.equal(module.records["StructuredPruning"]["neurons"], kept.neurons)
    numbers = "2 of 2 layers, 2 of 2 key/value heads, 24 of 48 neurons, 32 of 32 channels"
    assert f"structured pruning: 0.0M to 0.0M parameters, 17.9% less: {numbers}" in caplog.text


def test_what_is_refused(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing is to be removed"):
        StructuredPruning()
    with pytest.raises(ValueError, match=r"heads is -0.5: give a share"):
        StructuredPruning(heads=-0.5)
    module = FineTuning(Pretrained(str(network)))
    with pytest.raises(ValueError, match="gives no documents to calibrate on"):
        tiny_trainer(network.parent, [StructuredPruning(layers=1)]).fit(module, Batches(cut(documents(), [6, 6])))
    config = write_config(network, "QLoRA", distilled=False)
    assert "stored in few bits, out of which no part can be cut: prune it" in refused(capsys, "fit", "--config", config)
    config = write_config(network, "Full", distilled=False, layers=2)
    assert "layers is 2, and the network has 2: at least one must stay" in refused(capsys, "fit", "--config", config)
    config = write_config(network, "Full", distilled=False, importance="gradient")
    assert "expected activation, taylor or magnitude, not 'gradient'" in refused(capsys, "fit", "--config", config)
    scratch_gpt2 = FineTuning(scratch("gpt2"))
    callbacks = [StructuredPruning(neurons=0.5, importance="magnitude")]
    with pytest.raises(ValueError, match="GPT2LMHeadModel, of which it does not know what"):
        tiny_trainer(network.parent, callbacks).fit(scratch_gpt2, Batches(cut(documents(), [6, 6])))
