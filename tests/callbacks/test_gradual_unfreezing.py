from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_run import tiny_batches, tiny_loader, tiny_trainer
from torch import Tensor
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks import GradualUnfreezing
from lightllm.callbacks.gradual_unfreezing import layers_from_the_top
from lightllm.models.adapters import Adapter, Frozen, Full, LoRA
from lightllm.models.pretrained import Pretrained
from lightllm.modules import FineTuning, Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

LAYERS = ["head", "layers.1.", "layers.0.", "embed_tokens"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    tiny_llama(tied=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Watch(Callback):
    """Notes after every batch which layers train and which have moved."""

    def __init__(self) -> None:
        self.trained: list[list[str]] = []
        self.moved: list[list[str]] = []
        self.before: dict[str, Tensor] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        names = [layer_of(name) for name, p in pl_module.named_parameters() if p.requires_grad]
        self.trained.append([layer for layer in LAYERS if layer in names])

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        names = [layer_of(n) for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])]
        self.moved.append([layer for layer in LAYERS if layer in names])


def layer_of(name: str) -> str:
    return next((layer for layer in LAYERS if layer in name), "head")


def fit(
    folder: Path, pretrained: Path, callback: GradualUnfreezing, resume: Path | None = None, **fields: Any
) -> tuple[FineTuning, Watch, Trainer]:
    adapter: Adapter = fields.pop("adapter", None) or Frozen(num_blocks=2)
    schedule = Schedule("linear", warmup=2)
    module = FineTuning(Pretrained(str(pretrained), attention="sdpa"), adapter, schedule=schedule)
    watch = Watch()
    batches = fields.pop("batches", tiny_batches(4))
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = tiny_trainer(folder, [callback, watch, checkpoints], enable_checkpointing=True, **fields)
    trainer.fit(module, tiny_loader(batches), ckpt_path=resume, weights_only=True)
    return module, watch, trainer


def test_layers_are_thawed_from_the_top_by_steps(tmp_path: Path, pretrained: Path) -> None:
    _, watch, _ = fit(tmp_path, pretrained, GradualUnfreezing(every_n_steps=2), max_epochs=2)
    assert watch.trained == [LAYERS[:1]] * 2 + [LAYERS[:2]] * 2 + [LAYERS[:3]] * 2 + [LAYERS[:4]] * 2
    # The first step's learning rate is 0: the warm-up.
    assert watch.moved == [[], *watch.trained[1:]]


def test_by_epochs_and_accumulated_steps(tmp_path: Path, pretrained: Path) -> None:
    adapter = Frozen(num_blocks=1, embedding=False)
    _, watch, _ = fit(tmp_path / "a", pretrained, GradualUnfreezing(), max_epochs=2, adapter=adapter)
    partly = ["head", "layers.1.", "embed_tokens"]
    assert watch.trained == [partly] * 4 + [LAYERS] * 4
    callback = GradualUnfreezing(every_n_steps=1)
    _, watch, _ = fit(tmp_path / "b", pretrained, callback, max_epochs=2, accumulate_grad_batches=2)
    assert watch.trained == [LAYERS[:1]] * 2 + [LAYERS[:2]] * 2 + [LAYERS[:3]] * 2 + [LAYERS] * 2


def test_learning_rates_by_depth_and_decay_by_dimensions(tmp_path: Path, pretrained: Path) -> None:
    callback = GradualUnfreezing(every_n_steps=1, learning_rate_factor=0.5)
    module, _, trainer = fit(tmp_path, pretrained, callback, max_steps=3)
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    seen = []
    for group in trainer.optimizers[0].param_groups:
        (layer,) = {layer_of(name_of[parameter]) for parameter in group["params"]}
        (is_matrix,) = {parameter.ndim == 2 for parameter in group["params"]}
        # Half of the six steps are over: linear from the top at step 2 to 0 at step 3 would be 0, so ask the first.
        assert group["initial_lr"] == pytest.approx(3e-4 * 0.5 ** LAYERS.index(layer))
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0)
        seen += [name_of[parameter] for parameter in group["params"]]
    assert sorted(seen) == sorted(name for name, _ in module.named_parameters())


def test_the_schedule_moves_every_group(tmp_path: Path, pretrained: Path) -> None:
    callback = GradualUnfreezing(every_n_steps=1, learning_rate_factor=0.5)
    _, _, trainer = fit(tmp_path, pretrained, callback, max_steps=3)
    shares = {group["lr"] / group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert len(shares) == 1
    assert 0 <= shares.pop() < 1


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_run_ends_bitwise_the_same(tmp_path: Path, pretrained: Path, step: int) -> None:
    whole, _, trainer = fit(tmp_path, pretrained, GradualUnfreezing(every_n_steps=2), max_epochs=2)
    checkpoint = tmp_path / f"step={step}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    # What never trained is in the pretrained folder, and not in the checkpoint.
    assert any("layers.0." in name for name in saved) == (step > 4)
    resumed, watch, again = fit(tmp_path, pretrained, GradualUnfreezing(every_n_steps=2), checkpoint, max_epochs=2)
    assert watch.trained[0] == LAYERS[: 1 + step // 2]
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    states = [one.optimizers[0].state_dict()["state"] for one in (trainer, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key]["exp_avg"], states[1][key]["exp_avg"]) for key in states[0])


def test_a_tied_head_is_the_embedding() -> None:
    layers = layers_from_the_top(tiny_llama(tied=True))
    network = tiny_llama(tied=False)
    untied = layers_from_the_top(network)
    assert [len(layer) for layer in layers] == [1, 9, 9, 1]
    assert [len(layer) for layer in untied] == [2, 9, 9, 1]
    assert untied[3][0] is network.model.embed_tokens.weight
    assert untied[1][0] is network.model.layers[1].self_attn.q_proj.weight


@pytest.mark.parametrize("adapter", [Full(), LoRA(rank=2)])
def test_nothing_to_thaw_is_an_error(tmp_path: Path, pretrained: Path, adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="take the adapter Frozen"):
        fit(tmp_path, pretrained, GradualUnfreezing(), adapter=adapter, max_epochs=1)


def test_the_module_gets_its_optimizer_back(tmp_path: Path, pretrained: Path) -> None:
    callback = GradualUnfreezing(every_n_steps=1)
    module, _, _ = fit(tmp_path, pretrained, callback, max_steps=3)
    assert "GradualUnfreezing" not in module.optimizer.__qualname__


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps is at least 1, not 0"):
        GradualUnfreezing(every_n_steps=0)
    with pytest.raises(ValueError, match=r"learning_rate_factor is above 0 and at most 1, not 2.6"):
        GradualUnfreezing(learning_rate_factor=2.6)


class RankBatches:
    """Every second batch, from the rank on."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[TextBatch]:
        return iter(tiny_batches(12)[torch.distributed.get_rank() :: 2])


class SaveWeights(Callback):
    """Leaves each rank's weights in the folder."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        torch.save(dict(pl_module.named_parameters()), path)


def test_two_ranks_train_as_one(tmp_path: Path, pretrained: Path) -> None:
    one, watch, _ = fit(
        tmp_path / "one",
        pretrained,
        GradualUnfreezing(every_n_steps=1),
        batches=tiny_batches(12),
        accumulate_grad_batches=2,
    )
    assert watch.trained[-1] == LAYERS
    module = FineTuning(Pretrained(str(pretrained), attention="sdpa"), Frozen(2), schedule=Schedule("linear", warmup=2))
    trainer = tiny_trainer(
        tmp_path,
        [GradualUnfreezing(every_n_steps=1), SaveWeights()],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="fork"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, RankBatches())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name, parameter in one.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), atol=1e-6, rtol=1e-4)
