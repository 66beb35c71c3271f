"""Penalties in training: the gradients of a plain loop, what they make zero, runs that resume, and exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_objective import Batches, adamw, cut, documents, objective, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks import MagnitudePruning, SparsityRegularization
from lightllm.cli.rebuild import load
from lightllm.compression.effects import effective_layers
from lightllm.compression.sparsification import L1, GroupLasso, HardConcrete, Sparsity
from lightllm.export.compare import outputs
from lightllm.export.merge import merged_weights
from lightllm.models import Adapter, Full, LoRA
from lightllm.modules import FineTuning, LanguageModule, Schedule
from lightllm.modules.parameter_groups import parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"full": Full(), "lora": LoRA(rank=2, alpha=6)}


class Metrics(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[float]] = {}

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        for name, value in metrics.items():
            self.rows.setdefault(name, []).append(value)


def batches() -> list[TextBatch]:
    return cut(documents(48), [6] * 8)


def fit(
    folder: Path, callback: SparsityRegularization, adapter: Adapter | None = None, **fields: Any
) -> tuple[LanguageModule, Metrics]:
    torch.manual_seed(0)
    metrics = Metrics()
    module = FineTuning(scratch(), adapter, optimizer=adamw(), schedule=Schedule("constant"))
    others = fields.pop("callbacks", [])
    trainer = tiny_trainer(folder, [callback, *others], logger=[metrics], **fields)
    trainer.fit(module, datamodule=Batches(fields.pop("train", batches())))
    return module, metrics


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The blocks' merged weights with their gradients, by the names of their layers."""
    found = {}
    for name, module in network.named_modules():
        if name.endswith(LAYERS):
            factors = dict(module.named_parameters())
            weight = factors.get("base_layer.weight", factors.get("weight"))
            assert weight is not None
            if "lora_A.default.weight" in factors:
                weight = weight + 3.0 * factors["lora_B.default.weight"] @ factors["lora_A.default.weight"]
            found[name.removeprefix("base_model.model.")] = weight
    return found


def penalty_of(network: nn.Module, sparsity: Sparsity) -> Tensor:
    """By its formula."""
    weights = weights_of(network)
    if isinstance(sparsity, L1):
        return torch.stack([weight.abs().sum() for weight in weights.values()]).sum()
    units = []
    for block in (0, 1):
        gate, up, down = (weights[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        units += [torch.cat([gate[index], up[index], down[:, index]]).norm() for index in range(len(gate))]
    return 96**0.5 * torch.stack(units).sum()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("sparsity", [L1(), GroupLasso(["neurons"])])
def test_training_is_a_plain_loop_on_the_loss_and_the_penalty(tmp_path: Path, adapter: str, sparsity: Sparsity) -> None:
    train, strength = batches(), 1e-3
    callback = SparsityRegularization(sparsity, strength, begin=1, full=3, end=4)
    ours, _ = fit(tmp_path, callback, ADAPTERS[adapter], accumulate_grad_batches=2, gradient_clip_val=0.5)
    plain = objective(adapter=ADAPTERS[adapter])
    network = plain.built_network
    optimizer = adamw()(parameter_groups(plain))
    for step in range(4):
        loss, count = torch.zeros(()), 0
        for batch in train[2 * step : 2 * step + 2]:
            logits = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = loss + cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            count += int((batch["labels"] >= 0).sum())
        share = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0}[step]
        (loss / count + share * strength * penalty_of(network, sparsity)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    kept = {name: layer.fixed_mask().keep for name, layer in effective_layers(ours.built_network).items()}
    mine, theirs = weights_of(ours.built_network), weights_of(network)
    for name, weight in theirs.items():
        expected = weight * kept.get(name, 1) if adapter == "full" else weight
        torch.testing.assert_close(mine[name], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_small_at_the_end_is_zero_for_good(tmp_path: Path, adapter: str) -> None:
    callback = SparsityRegularization(L1(), 0.01, threshold=0.05, full=0.0, end=0.5, leave_out=["o_proj"])
    module, metrics = fit(tmp_path, callback, ADAPTERS[adapter])
    zeros, sizes = 0, 0
    for name, weight in merged_weights(module.built_network):
        if name.removesuffix(".weight").endswith(LAYERS):
            if "o_proj" in name:
                assert weight.all()
                continue
            zeros, sizes = zeros + int((weight == 0).sum()), sizes + weight.numel()
    masked = sum(int((~one.fixed_mask().keep).sum()) for one in effective_layers(module.built_network).values())
    assert 0.02 * sizes < zeros == masked < sizes
    assert len(metrics.rows["train/penalty"]) == 4, "at the four steps before the end"
    assert len(metrics.rows["sparsity"]) == 5, "and at the end"
    assert metrics.rows["sparsity"][-1] == zeros / sizes
    assert metrics.rows["sparsity"][0] < metrics.rows["sparsity"][-1]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_strong_penalty_closes_gates_and_a_weak_one_does_not(tmp_path: Path, adapter: str) -> None:
    closed = {}
    for strength in (1e-9, 1.0):
        sparsity = HardConcrete(["neurons"], learning_rate=0.5)
        callback = SparsityRegularization(sparsity, strength, threshold=0.1, full=0.0, end=1.0)
        module, metrics = fit(tmp_path, callback, ADAPTERS[adapter])
        weights = dict(merged_weights(module.built_network))
        columns = [weights[f"model.layers.{block}.mlp.down_proj.weight"].abs().sum(0) for block in (0, 1)]
        rows = [weights[f"model.layers.{block}.mlp.up_proj.weight"].abs().sum(1) for block in (0, 1)]
        dead = torch.cat(columns) == 0
        assert torch.equal(torch.cat(rows) == 0, dead)
        closed[strength] = float(dead.float().mean())
        assert metrics.rows["train/penalty"][0] == pytest.approx(dead.numel() * 0.99, rel=0.02)
    assert closed[1e-9] < 0.1
    assert closed[1.0] > 0.9


def test_gates_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    callback = SparsityRegularization(HardConcrete(["heads"], learning_rate=0.123), 0.1)
    module, _ = fit(tmp_path, callback)
    groups = module.trainer.optimizers[0].param_groups
    assert groups[-1]["lr"] == 0.123
    assert [one.shape for one in groups[-1]["params"]] == [(2,), (2,)]
    assert module.optimizer.__qualname__.startswith("adamw")


def write_config(folder: Path, adapter: str, callback: dict[str, Any], max_steps: int = 6) -> None:
    config: dict[str, Any] = {
        "run": "run",
        "seed_everything": 3,
        "trainer": {
            "max_steps": max_steps,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "lightllm.callbacks.SparsityRegularization", "init_args": callback}],
        },
        "checkpoint": {"every_n_train_steps": 1, "keep": 9},
        "model": {
            "class_path": "lightllm.modules.FineTuning",
            "init_args": {
                "network": {
                    "class_path": "lightllm.models.Pretrained",
                    "init_args": {"name": str(save_small_network(folder / "network"))},
                },
                "adapter": {"class_path": f"lightllm.models.{adapter}"},
                "schedule": {"shape": "constant"},
            },
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {"train": str(save_chats(folder / "chats.jsonl", 40)), "max_length": 128},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


GATES = {
    "sparsity": {
        "class_path": "lightllm.compression.sparsification.HardConcrete",
        "init_args": {"over": ["neurons", "heads"], "learning_rate": 0.5, "initial": 0.6},
    },
    "strength": 0.05,
    "threshold": 0.2,
    "full": 1,
    "end": 5,
}


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_run_with_gates_resumes_bit_for_bit_and_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    settle_in(tmp_path, monkeypatch)
    write_config(tmp_path, adapter, GATES)
    lightllm("fit", "--config", "config.yaml")
    whole = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for steps in (2, 4, 5):
        assert (tmp_path / f"run/checkpoints/step={steps}.ckpt").is_file()
        shutil.copytree(tmp_path / "run", tmp_path / f"cut{steps}")
        for file in (tmp_path / f"cut{steps}/checkpoints").iterdir():
            if file.name != f"step={steps}.ckpt":
                file.unlink()
        lightllm("fit", "--resume", f"cut{steps}")
        cut_run = torch.load(tmp_path / f"cut{steps}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert whole.keys() == cut_run.keys()
        assert all(torch.equal(tensor, cut_run[name]) for name, tensor in whole.items())
    loaded = load("run", "newest")
    lightllm("export", "run", "--checkpoint", "newest", "--to", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    rows = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = outputs(loaded.network, rows)
    assert (outputs(dense, rows) - logits).abs().max() <= 1e-5 * logits.abs().max()
    down, up = (dense.get_parameter(f"model.layers.0.mlp.{name}_proj.weight") for name in ("down", "up"))
    dead = down.abs().sum(0) == 0
    assert 0 < int(dead.sum()) < 48
    assert torch.equal(up.abs().sum(1) == 0, dead)


def test_whatever_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle_in(tmp_path, monkeypatch)
    l1 = {"sparsity": {"class_path": "lightllm.compression.sparsification.L1"}, "strength": 0.1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"strength": -1.0}, "strength is -1.0: give a number of at least 0"),
        ({"threshold": -0.5}, "threshold is -0.5: give a number of at least 0"),
        ({"full": 0.9, "end": 0.5}, "begin, full and end are the steps 0, 5 and 3: give them in this order"),
        ({"leave_out": ["query"]}, "no layer's name matches 'query'"),
    ]
    for fields, message in cases:
        write_config(tmp_path, "Full", l1 | fields)
        assert message in refused(capsys, "fit", "--config", "config.yaml")


def test_weights_have_one_mask_at_most(tmp_path: Path) -> None:
    callback = SparsityRegularization(L1(), 0.1, leave_out=["mlp"])
    with pytest.raises(ValueError, match=r"SparsityRegularization and MagnitudePruning both mask .*k_proj"):
        fit(tmp_path, callback, callbacks=[MagnitudePruning(0.5)])
