"""Movement pruning beside a plain loop of the paper's equations, and through runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from tiny_objective import Batches, cut, documents, objective, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks import MovementPruning
from lightllm.cli.rebuild import load
from lightllm.compression.effects import effective_layers
from lightllm.compression.masks import follows, sparsity_of
from lightllm.compression.movement import LearnedMask
from lightllm.export.compare import outputs
from lightllm.export.merge import merged_weights
from lightllm.models import Adapter, Full, LoRA
from lightllm.models.anatomy import unwrapped
from lightllm.modules import FineTuning, LanguageModule, Schedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, SCORE_RATE = 0.2, 0.5


def batches() -> list[TextBatch]:
    return cut(documents(96), [6] * 16)


def fit(folder: Path, callback: MovementPruning, adapter: Adapter | None = None, **fields: Any) -> LanguageModule:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=RATE)
    module = FineTuning(scratch(), adapter, optimizer=optimizer, schedule=Schedule("constant"))
    trainer = tiny_trainer(folder, [callback], **fields)
    trainer.fit(module, datamodule=Batches(batches()))
    return module


def loss_of(network: nn.Module, weights: Mapping[str, Tensor], step: list[TextBatch]) -> Tensor:
    """The mean loss per target token of a plain network with these weights in place of its own."""
    loss, count = torch.zeros(()), 0
    for batch in step:
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        logits = functional_call(network, dict(weights), (), inputs).logits
        loss = loss + cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        count += int((batch["labels"] >= 0).sum())
    return loss / count


def top(scores: Tensor, sparsity: float) -> Tensor:
    """`M`: 1 for all but the lowest scores."""
    lowest = scores.flatten().argsort(stable=True)[: round(sparsity * scores.numel())]
    return torch.ones(scores.numel()).index_fill(0, lowest, 0.0).view_as(scores)


class PaperLoop:
    """Full training by the paper's equations: `W' = M(S) * W`, `dL/dS = dL/dW' * W`, cubic sparsity."""

    def __init__(self) -> None:
        self.network = unwrapped(objective().built_network)
        self.weights = {
            name: one.detach().clone()
            for name, one in self.network.named_parameters()
            if name.removesuffix(".weight").endswith(LAYERS)
        }
        self.others = {name: one for name, one in self.network.named_parameters() if name not in self.weights}
        self.scores = {name: torch.zeros_like(one) for name, one in self.weights.items()}
        self.masks = {name: torch.ones_like(one) for name, one in self.weights.items()}

    def step(self, step: list[TextBatch], learns: bool) -> None:
        effective = {name: (self.masks[name] * one).requires_grad_() for name, one in self.weights.items()}
        others = list(self.others.values())
        *of_weights, _ = gradients = torch.autograd.grad(
            loss_of(self.network, effective, step), [*effective.values(), *others]
        )
        for name, gradient in zip(self.weights, of_weights, strict=False):
            if learns:
                self.scores[name] -= SCORE_RATE * gradient * self.weights[name]
            self.weights[name] -= RATE * gradient * self.masks[name]
        with torch.no_grad():
            for other, gradient in zip(others, gradients[len(self.weights) :], strict=True):
                other -= RATE * gradient

    def prune(self, sparsity: float) -> None:
        self.masks = {name: top(one, sparsity) for name, one in self.scores.items()}


def test_training_is_a_plain_loop_of_the_papers_equations(tmp_path: Path) -> None:
    callback = MovementPruning(0.6, begin=1, end=6, every_n_steps=1, score_learning_rate=SCORE_RATE)
    ours = fit(tmp_path, callback, accumulate_grad_batches=2)
    plain, train = PaperLoop(), batches()
    came_back = 0
    for step in range(8):
        plain.step(train[2 * step : 2 * step + 2], learns=step < 6)
        if 1 < step + 1 <= 6:
            before = plain.masks
            plain.prune(0.6 * (1 - (1 - step / 5) ** 3))
            came_back += sum(int(((before[name] == 0) & (one == 1)).sum()) for name, one in plain.masks.items())
    assert came_back > 20, "weights come back while the schedule runs"
    layers = effective_layers(ours.built_network)
    for name, weight in plain.weights.items():
        layer = layers[name.removesuffix(".weight")]
        mask = layer.effect.masking
        assert isinstance(mask, LearnedMask)
        assert mask.fixed
        torch.testing.assert_close(mask.scores.detach(), plain.scores[name], atol=1e-6, rtol=1e-4)
        assert torch.equal(mask.mask.keep, plain.masks[name] == 1)
        torch.testing.assert_close(layer.base.weight.detach(), weight * plain.masks[name], atol=1e-6, rtol=1e-4)
        assert int((layer.effective_weight() == 0).sum()) == round(0.6 * weight.numel())
    for name, other in plain.others.items():
        torch.testing.assert_close(ours.built_network.get_parameter(name), other, atol=1e-6, rtol=1e-4)


def test_under_lora_scores_follow_the_merged_weight(tmp_path: Path) -> None:
    adapter = LoRA(rank=2, alpha=6)
    callback = MovementPruning(0.5, begin=0, end=2, every_n_steps=1, score_learning_rate=SCORE_RATE)
    ours = fit(tmp_path, callback, adapter, max_steps=3)
    module = objective()
    network, start = unwrapped(module.built_network), objective(adapter=adapter).built_network
    factors = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): [
            one.detach().clone(),
            start.get_parameter(name.replace("lora_A", "lora_B")).detach().clone(),
        ]
        for name, one in start.named_parameters()
        if "lora_A" in name
    }
    scores = {name: torch.zeros_like(network.get_parameter(f"{name}.weight")) for name in factors}
    masks = {name: torch.ones_like(one) for name, one in scores.items()}
    for step, batch in enumerate(batches()[:3]):
        merged = {
            name: network.get_parameter(f"{name}.weight").detach() + 3.0 * up @ down
            for name, (down, up) in factors.items()
        }
        effective = {f"{name}.weight": (masks[name] * one).requires_grad_() for name, one in merged.items()}
        gradients = torch.autograd.grad(loss_of(network, effective, [batch]), list(effective.values()))
        for (name, pair), gradient in zip(factors.items(), gradients, strict=True):
            down, up = pair
            if step < 2:
                scores[name] -= SCORE_RATE * gradient * merged[name]
            through = gradient * masks[name]
            pair[:] = down - RATE * 3.0 * up.T @ through, up - RATE * 3.0 * through @ down.T
        if step + 1 <= 2:
            masks = {name: top(one, 0.5 * (1 - (1 - (step + 1) / 2) ** 3)) for name, one in scores.items()}
    found = dict(merged_weights(ours.built_network))
    for name, (down, up) in factors.items():
        expected = masks[name] * (network.get_parameter(f"{name}.weight").detach() + 3.0 * up @ down)
        torch.testing.assert_close(found[f"{name}.weight"], expected, atol=1e-6, rtol=1e-4)
        assert sparsity_of(found[f"{name}.weight"]) == 0.5
        base = effective_layers(ours.built_network)[name].base.weight
        assert torch.equal(base, network.get_parameter(f"{name}.weight")), "frozen weights stay as they were"


@pytest.mark.parametrize("adapter", [Full(), LoRA(rank=2)])
def test_budgets_and_patterns(tmp_path: Path, adapter: Adapter) -> None:
    module = fit(tmp_path, MovementPruning(0.5, budget="network", end=0.5), adapter, max_steps=4)
    weights = [
        one for name, one in merged_weights(module.built_network) if name.removesuffix(".weight").endswith(LAYERS)
    ]
    shares = [sparsity_of(weight) for weight in weights]
    assert sum((one == 0).sum() for one in weights) == sum(one.numel() for one in weights) // 2
    assert len(set(shares)) > 3
    module = fit(tmp_path, MovementPruning(pattern="2:4", schedule="one_shot", begin=2), adapter, max_steps=4)
    layers = effective_layers(module.built_network)
    for layer in layers.values():
        weight = layer.effective_weight()
        assert sparsity_of(weight) == 0.5
        assert follows(weight, callback_pattern())


def callback_pattern() -> Any:
    return MovementPruning(pattern="2:4", schedule="one_shot", begin=2).pattern


def write_config(folder: Path, adapter: str, callback: dict[str, Any]) -> None:
    config: dict[str, Any] = {
        "run": "run",
        "seed_everything": 3,
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "lightllm.callbacks.MovementPruning", "init_args": callback}],
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
            },
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {"train": str(save_chats(folder / "chats.jsonl", 40)), "max_length": 128},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_run_resumes_bit_for_bit_and_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    settle_in(tmp_path, monkeypatch)
    write_config(tmp_path, adapter, {"sparsity": 0.5, "begin": 1, "end": 4, "every_n_steps": 1})
    lightllm("fit", "--config", "config.yaml")
    whole = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for step in (2, 4, 5):
        assert (tmp_path / f"run/checkpoints/step={step}.ckpt").is_file()
        shutil.copytree(tmp_path / "run", tmp_path / f"cut{step}")
        for file in (tmp_path / f"cut{step}/checkpoints").iterdir():
            if file.name != f"step={step}.ckpt":
                file.unlink()
        lightllm("fit", "--resume", f"cut{step}")
        resumed = torch.load(tmp_path / f"cut{step}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    loaded = load("run", "newest")
    lightllm("export", "run", "--checkpoint", "newest", "--to", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    rows = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = outputs(loaded.network, rows)
    assert (outputs(dense, rows) - logits).abs().max() <= 1e-5 * logits.abs().max()
    for name, weight in dense.named_parameters():
        if name.removesuffix(".weight").endswith(LAYERS):
            assert sparsity_of(weight) == 0.5


def test_whatever_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle_in(tmp_path, monkeypatch)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 0.5, "score_learning_rate": 0.0}, "score_learning_rate is 0.0: give one above 0"),
        ({"sparsity": 0.5, "schedule": "one_shot", "begin": 0}, "before any score is learned: set begin later"),
        ({"pattern": "2:4", "schedule": "one_shot", "budget": "network"}, "set budget to layer"),
        ({"pattern": "2:4"}, "set schedule to one_shot"),
    ]
    for fields, message in cases:
        write_config(tmp_path, "Full", fields)
        assert message in refused(capsys, "fit", "--config", "config.yaml")


class RankBatches:
    """Every second batch, from the rank on."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[TextBatch]:
        return iter(batches()[torch.distributed.get_rank() :: 2])


class SaveState(Callback):
    """Leaves each rank's state in the folder."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def test_two_ranks_learn_one_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # ranks begin with the seed of an earlier run, if there is one
    fields: dict[str, Any] = {"begin": 1, "end": 6, "every_n_steps": 1, "score_learning_rate": SCORE_RATE}
    alone = fit(tmp_path, MovementPruning(0.6, **fields), accumulate_grad_batches=2).state_dict()
    torch.manual_seed(0)
    module = FineTuning(scratch(), optimizer=partial(torch.optim.SGD, lr=RATE), schedule=Schedule("constant"))
    trainer = tiny_trainer(
        tmp_path,
        [MovementPruning(0.6, **fields), SaveState()],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="fork"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, RankBatches())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert alone.keys() == first.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-6, rtol=1e-4)
