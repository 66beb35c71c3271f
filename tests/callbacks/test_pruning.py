"""The base of pruning callbacks, with the simplest way to choose: given scores."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_run import text_data
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_architectures import small_fields
from tiny_objective import Batches, MeasuredBatches, adamw, cut, documents, objective, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.callbacks import BeforeAndAfter, Checkpoint, MagnitudePruning, Pruning
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers
from lightllm.compression.masking import Masking, masks_of
from lightllm.compression.masks import Amount, follows, layer_mask, sparsity_of
from lightllm.export.merge import merged_weights
from lightllm.models import Adapter, FromConfig, Frozen, Full, LoRA, Transformation
from lightllm.modules import FineTuning, LanguageModule, Schedule
from lightllm.modules.parameter_groups import parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class LastPruning(Pruning):
    """Prunes the last weights of each layer, whatever they are."""

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.amounts: list[Amount] = []
        self.modes: list[bool] = []

    @override
    def transformation(self) -> Transformation:
        return Masking(type(self).__name__, self.leave_out)

    @override
    def prune(self, pl_module: LanguageModule, layers: dict[str, EffectiveLayer], amount: Amount) -> None:
        self.amounts.append(amount)
        self.modes.append(pl_module.training)
        for layer in layers.values():
            scores = -torch.arange(layer.base.weight.numel(), dtype=torch.float32).view_as(layer.base.weight)
            layer.set_keep(layer_mask(scores, amount))


class Watch(Callback):
    """Sparsity of the weights and of their gradients, after every batch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.keeps: list[dict[str, Tensor]] = []
        self.gradients_held = True

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        for layer in effective_layers(pl_module.built_network).values():
            gradient = layer.base.weight.grad
            if gradient is not None:
                self.gradients_held &= bool((gradient[~layer.fixed_mask().keep] == 0).all())

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        layers = effective_layers(pl_module.built_network)
        self.weights.append(sparsity_of(torch.cat([one.effective_weight().flatten() for one in layers.values()])))
        self.keeps.append({name: one.fixed_mask().keep.clone() for name, one in layers.items()})


def batches() -> list[TextBatch]:
    return cut(documents(48), [6] * 8)


def fit(
    folder: Path,
    callbacks: Iterable[Callback],
    adapter: Adapter | None = None,
    train: list[TextBatch] | None = None,
    optimizer: OptimizerCallable | None = None,
    **fields: Any,
) -> LanguageModule:
    torch.manual_seed(0)
    module = FineTuning(scratch(), adapter, optimizer=optimizer or adamw(), schedule=Schedule("constant"))
    tiny_trainer(folder, list(callbacks), **fields).fit(module, datamodule=Batches(train or batches()))
    return module


ADAPTERS = {"full": Full(), "lora": LoRA(rank=2, dropout=0.0)}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_pruned_before_the_first_step_and_ever_after(tmp_path: Path, adapter: str, fields: Any) -> None:
    watch, pruning = Watch(), LastPruning(**fields)
    module = fit(tmp_path, [pruning, watch], ADAPTERS[adapter])
    assert watch.weights == [0.5] * 8
    assert watch.gradients_held
    assert pruning.amounts == [pruning.pattern or 0.5]
    assert len(watch.keeps[0]) == 14
    for name, weight in merged_weights(module.built_network):
        layer = watch.keeps[0].get(name.removesuffix(".weight"))
        if layer is not None:
            assert torch.equal(weight == 0, ~layer), "exactly what the mask says"
            assert pruning.pattern is None or follows(weight, pruning.pattern)


def test_full_training_is_a_plain_loop_that_masks_gradients_and_weights(tmp_path: Path) -> None:
    train = batches()
    ours = fit(tmp_path, [LastPruning(0.5, begin=3)], train=train)
    plain = objective()
    optimizer = plain.optimizer(parameter_groups(plain))
    names = [name for name, _ in plain.built_network.named_modules() if name.endswith("proj")]
    weights = [plain.built_network.get_submodule(name).get_parameter("weight") for name in names]
    assert len(weights) == 14
    for step, batch in enumerate(train):
        if step == 3:
            masks = [(torch.arange(w.numel()) < w.numel() / 2).view_as(w) for w in weights]
            for weight, mask in zip(weights, masks, strict=True):
                weight.data *= mask
        loss = plain.criterion(plain(batch), batch)
        optimizer.zero_grad()
        (loss.sum / loss.weight).backward()
        if step >= 3:
            for weight, mask in zip(weights, masks, strict=True):
                assert weight.grad is not None
                weight.grad *= mask
        optimizer.step()
        if step >= 3:
            for weight, mask in zip(weights, masks, strict=True):
                weight.data *= mask
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_accumulated_step_is_the_step_that_was_not_cut(tmp_path: Path) -> None:
    whole, cut_in_two = Watch(), Watch()
    made = documents(48)
    same: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}
    one = fit(tmp_path, [LastPruning(0.5, begin=2), whole], train=cut(made, [12] * 4), **same)
    same["accumulate_grad_batches"] = 2
    two = fit(tmp_path, [LastPruning(0.5, begin=2), cut_in_two], train=cut(made, [6] * 8), **same)
    assert whole.weights == [0, 0.5, 0.5, 0.5]
    assert cut_in_two.weights == [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cubic_prunes_step_by_step_until_the_mask_is_fixed(tmp_path: Path) -> None:
    watch, pruning = Watch(), LastPruning(0.75, schedule="cubic", begin=0.125, end=0.75, every_n_steps=2)
    fit(tmp_path, [pruning, watch])
    # From step 1 to step 6: prunings at 1 (of nothing), 3, 5 and 6.
    expected = [0.75 * (1 - (1 - done / 5) ** 3) for done in (2, 4, 5)]
    assert pruning.amounts == pytest.approx(expected)
    assert watch.weights == pytest.approx([0, 0, expected[0], expected[0], expected[1], 0.75, 0.75, 0.75], abs=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_resumed_at_any_step_as_if_it_had_never_stopped(tmp_path: Path, adapter: str) -> None:
    def run(folder: str, resume: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        network = FromConfig("llama", small_fields("llama", vocab_size=300))
        module = FineTuning(network, ADAPTERS[adapter], optimizer=adamw(), schedule=Schedule("constant"))
        pruning = MagnitudePruning(0.6, schedule="cubic", begin=1, end=6, every_n_steps=2)
        saving = Checkpoint(every_n_train_steps=1, monitor=None, keep=9)
        trainer = tiny_trainer(
            tmp_path / folder, [pruning, saving], max_epochs=-1, max_steps=8, enable_checkpointing=True
        )
        trainer.fit(module, datamodule=text_data(tmp_path), ckpt_path=resume, weights_only=True)
        saved: dict[str, Any] = torch.load(tmp_path / folder / "checkpoints/last.ckpt", weights_only=True)
        return saved

    whole = run("whole")
    assert any("effect" in name for name in whole["state_dict"])
    for stop in range(1, 8):
        resumed = run(f"from{stop}", tmp_path / f"whole/checkpoints/step={stop}.ckpt")
        assert resumed["state_dict"].keys() == whole["state_dict"].keys()
        for name, value in whole["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], value), f"{name}, stopped after step {stop}"


@pytest.mark.parametrize("first", ["pruning", "measuring"])
def test_before_and_after_measures_the_dense_network_first(tmp_path: Path, first: str) -> None:
    measuring, pruning = BeforeAndAfter(), LastPruning(0.9)
    callbacks = [pruning, measuring] if first == "pruning" else [measuring, pruning]
    module = FineTuning(scratch(), optimizer=adamw())
    val = cut(documents(12, seed=5), [12])
    tiny_trainer(tmp_path, callbacks).fit(module, datamodule=MeasuredBatches(batches(), val))
    assert measuring._before is not None
    torch.manual_seed(0)
    dense = FineTuning(scratch())
    (expected,) = tiny_trainer(tmp_path, []).validate(dense, MeasuredBatches([], val), verbose=False)
    assert measuring._before["metrics"]["loss"] == pytest.approx(expected["val/loss"], rel=1e-5)


def test_a_layer_that_is_left_out_is_dense_and_counts_nowhere(tmp_path: Path) -> None:
    pruning = LastPruning(0.5, leave_out=["down_proj", r"layers\.0\.self_attn"])
    module = fit(tmp_path, [pruning])
    masked = set(effective_layers(module.built_network))
    assert masked == set(pruning._layers)
    assert len(masked) == 14 - 2 - 4
    assert not any("down_proj" in name or "layers.0.self_attn" in name for name in masked)


def test_masks_survive_in_a_frozen_network(tmp_path: Path) -> None:
    module = fit(tmp_path, [LastPruning(0.5)], Frozen(num_blocks=1))
    for layer in effective_layers(module.built_network).values():
        assert sparsity_of(layer.base.weight) == 0.5


class NotingLogger(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "sparsity" in metrics:
            self.rows.append((step, dict(metrics)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sparsity": 0.5}, (0, 0.5)),
        ({"pattern": "2:4", "begin": 3}, (3, 0.5)),
        ({"sparsity": 0.75, "schedule": "cubic", "begin": 1, "end": 5, "every_n_steps": 2}, (5, 0.75)),
    ],
)
def test_the_last_pruning_is_announced_as_soon_as_it_is_done(
    tmp_path: Path, fields: dict[str, Any], expected: tuple[int, float]
) -> None:
    told: list[tuple[str, int, float]] = []

    class Listening(Callback):
        @override
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            def note(step: str, network: nn.Module) -> None:
                masks = [keep.flatten() for keep in masks_of(network).values()]
                told.append((step, trainer.global_step, sparsity_of(torch.cat(masks)) if masks else 0.0))

            pl_module.announcements.listen(note)

    fit(tmp_path, [Listening(), LastPruning(**fields)])
    assert told == [("dense", 0, 0.0), ("LastPruning", *expected), ("trained", 8, expected[1])]


def test_sparsity_is_logged_whenever_weights_are_pruned(tmp_path: Path) -> None:
    logger = NotingLogger()
    fit(tmp_path, [LastPruning(0.5, schedule="cubic", begin=0, end=4, every_n_steps=2)], logger=[logger])
    assert [step for step, _ in logger.rows] == [1, 3], "that of the step which was just done"
    for (_, metrics), expected in zip(logger.rows, [0.5 * (1 - 0.5**3), 0.5], strict=True):
        assert metrics["sparsity"] == pytest.approx(expected, abs=1e-3)
        assert metrics["sparsity/model.layers.0.self_attn.q_proj"] == pytest.approx(expected, abs=1e-3)
        assert len(metrics) == 15
    logger = NotingLogger()
    fit(tmp_path, [LastPruning(0.5)], logger=[logger])
    assert [step for step, _ in logger.rows] == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of them"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of them"),
        ({"sparsity": 1.5}, "1.5 is not a share"),
        ({"pattern": "4:2"}, "not N:M"),
        ({"pattern": "2:4", "schedule": "cubic"}, "all at once: set schedule to one_shot"),
        ({"sparsity": 0.5, "every_n_steps": 0}, "every 0 steps"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LastPruning(**fields)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([LastPruning(0.5, begin=9)], "begin is step 9, and the run has steps 0 to 8"),
        ([LastPruning(0.5, schedule="cubic", begin=4, end=4)], "ends at 4: end it later"),
        ([LastPruning(pattern="2:5")], "q_proj has rows of 32 weights, which 2:5 cannot cut evenly"),
        ([LastPruning(0.5), MagnitudePruning(0.5)], "Pruning and .*Pruning both prune model.layers.0"),
        ([LastPruning(0.5, leave_out=["typo"])], "'typo'"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_it_begins(
    tmp_path: Path, callbacks: list[Callback], message: str
) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [*callbacks, watch])
    assert not watch.weights


def test_two_may_share_the_layers_between_them(tmp_path: Path) -> None:
    attention, rest = LastPruning(pattern="2:4", leave_out=["mlp"]), MagnitudePruning(0.25, leave_out=["self_attn"])
    module = fit(tmp_path, [attention, rest])
    for name, layer in effective_layers(module.built_network).items():
        assert sparsity_of(layer.effective_weight()) == (0.5 if "self_attn" in name else 0.25)


def test_shares_of_a_short_run_may_fall_on_one_step(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, [LastPruning(0.5, schedule="cubic", begin=0.0, end=0.1), watch], max_steps=2)
    assert watch.weights == [0.5, 0.5]
