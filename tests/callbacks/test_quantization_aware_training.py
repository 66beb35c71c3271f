"""Quantization-aware training through runs: when it begins, that it resumes to the bit, and what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import lightllm, refused, save_chats, save_small_network, settle_in
from lightning.pytorch import Callback, Trainer
from resumable_run import SaveAt
from tiny_networks import token_rows
from tiny_objective import Batches, adamw, cut, documents, scratch
from tiny_run import tiny_loader, tiny_trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightllm.callbacks import QuantizationAwareTraining, RandomState, Transforming
from lightllm.cli.rebuild import load
from lightllm.compression.effective_weight import EffectiveLayer
from lightllm.compression.effects import effective_layers, mask_layers
from lightllm.compression.fake_quantizer import GridFakeQuantizer
from lightllm.models import Adapter, DoRA, Full, LoRA, Record, Transformation, TransformationKind
from lightllm.modules import FineTuning, Schedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

STEPS = 6


class ResumableBatches(Batches):
    def train_dataloader(self) -> Any:
        return tiny_loader(self.train)


def batches() -> Batches:
    return ResumableBatches(cut(documents(24), [4] * 6))


def quantizer(layer: EffectiveLayer) -> GridFakeQuantizer:
    found = layer.effect.fake_quantizer
    assert isinstance(found, GridFakeQuantizer)
    return found


class Noting(Callback):
    """Notes in which state every step trains, and its loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[tuple[int, bool, bool]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        layers = effective_layers(pl_module.built_network).values()
        if not layers:
            return
        (state,) = {(quantizer(layer).enabled, not quantizer(layer).is_straight_through) for layer in layers}
        self.states.append((trainer.global_step, *state))


def fit(
    folder: Path,
    callbacks: list[Callback],
    adapter: Adapter | None = None,
    steps: int = STEPS,
    resume: Path | None = None,
    **fields: Any,
) -> FineTuning:
    torch.manual_seed(0)
    module = FineTuning(scratch(), adapter or Full(), optimizer=adamw(), schedule=Schedule("constant"))
    trainer = tiny_trainer(folder, [*callbacks, RandomState()], max_steps=steps, max_epochs=-1, **fields)
    trainer.fit(module, batches(), ckpt_path=resume, weights_only=True)
    return module


def qat(**fields: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**({"scheme": "int8_dynamic_int4", "group_size": 16} | fields))


@pytest.mark.parametrize(("start", "freeze", "accumulate"), [(2, 4, 1), (0.34, 0.67, 1), (2, 4, 2), (0, None, 1)])
def test_it_begins_and_freezes_when_it_is_due(
    tmp_path: Path, start: float, freeze: float | None, accumulate: int
) -> None:
    noting, plain = Noting(), Noting()
    fit(tmp_path, [qat(start=start, freeze_scales=freeze), noting], accumulate_grad_batches=accumulate)
    fit(tmp_path, [plain], accumulate_grad_batches=accumulate)
    expected = [(step, step >= (2 if start else 0), freeze is not None and step >= 4) for step in range(STEPS)]
    assert [state for state in noting.states if state[0] < STEPS][::1] == expected
    begin = 2 * accumulate if start else 0
    assert noting.losses[:begin] == plain.losses[:begin]
    assert noting.losses[begin] != plain.losses[begin]


def test_frozen_scales_are_those_of_their_step(tmp_path: Path) -> None:
    before = fit(tmp_path, [qat()], steps=4)
    after = fit(tmp_path, [qat(freeze_scales=4)])
    for name, layer in effective_layers(before.built_network).items():
        grid = quantizer(layer).scheme.grid
        frozen = quantizer(effective_layers(after.built_network)[name]).frozen_scales
        assert torch.equal(frozen, grid.scales(grid.groups(layer.base.weight)))


@pytest.mark.parametrize("resumed_at", [1, 2, 4, 5])
@pytest.mark.parametrize("adapter", ["full", "lora", "lora and base"])
def test_resumed_it_goes_on_to_the_bit(tmp_path: Path, adapter: str, resumed_at: int) -> None:
    def callbacks() -> list[Callback]:
        return [qat(start=2, freeze_scales=4, train_base=adapter == "lora and base")]

    def new() -> Adapter:
        return Full() if adapter == "full" else LoRA(rank=2)

    whole = fit(tmp_path, [*callbacks(), SaveAt(tmp_path, "on_train_batch_end")], new())
    checkpoint = tmp_path / f"step={resumed_at}.ckpt"
    resumed = fit(tmp_path, callbacks(), new(), resume=checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    base = [name for name in state if name.endswith("q_proj.base_layer.weight")]
    assert bool(base) == (adapter != "full")


def test_only_layers_that_are_not_left_out_are_rounded_and_two_schemes_share_a_network(tmp_path: Path) -> None:
    module = fit(
        tmp_path,
        [qat(leave_out=["mlp", "o_proj"]), qat(scheme="int8_weight_only", group_size=None, leave_out=["self_attn"])],
        steps=1,
    )
    schemes = {name.rsplit(".", 1)[1]: quantizer(layer).scheme.name for name, layer in layers(module).items()}
    assert schemes == dict.fromkeys(["q_proj", "k_proj", "v_proj"], "int8_dynamic_int4") | dict.fromkeys(
        ["gate_proj", "up_proj", "down_proj"], "int8_weight_only"
    )


def layers(module: FineTuning) -> dict[str, EffectiveLayer]:
    return effective_layers(module.built_network)


class _Halving(Transformation):
    kind = TransformationKind.MASK

    def apply(self, network: nn.Module, record: Record | None) -> Record | None:
        for layer in mask_layers(network, []).values():
            layer.set_keep(torch.arange(layer.base.weight.numel()).view_as(layer.base.weight) % 2 == 0)
        return None


class HalfMasked(Transforming):
    def transformation(self) -> Transformation:
        return _Halving("HalfMasked")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for layer in layers(pl_module).values():
            layer.hold_gradient()


@pytest.mark.parametrize("adapter", [Full(), LoRA(rank=2)])
def test_under_a_mask_zeros_stay_zero_whatever_the_order(tmp_path: Path, adapter: Adapter) -> None:
    for callbacks in ([HalfMasked(), qat()], [qat(), HalfMasked()]):
        module = fit(tmp_path, callbacks, adapter, steps=3)
        for layer in layers(module).values():
            weight = layer.effective_weight()
            assert (weight.flatten()[1::2] == 0).all()
            grid = quantizer(layer).scheme.grid
            assert torch.equal(weight, grid.round_weight(layer.masked_weight()))
            assert weight.any()


@pytest.mark.parametrize(
    ("callbacks", "adapter", "message"),
    [
        ([qat(start=3, freeze_scales=0.4)], None, "freeze_scales is step 2, before anything is rounded at step 3"),
        ([qat(start=9)], None, "start is step 9, and the run has steps 0 to 6"),
        ([qat(train_base=True)], None, "train_base trains weights beside LoRA, and there is no adapter"),
        ([qat(), qat(leave_out=["mlp"])], None, "two of the callbacks are QuantizationAwareTraining of int8_dynamic_i"),
        ([qat()], DoRA(rank=2), "variant of LoRA"),
        ([qat(group_size=20)], None, "which groups of 20 do not divide"),
        ([qat(leave_out=["no_proj"])], None, "no layer's name matches 'no_proj'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, callbacks: list[Callback], adapter: Adapter | None, message: str
) -> None:
    noting = Noting()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [*callbacks, noting], adapter)
    assert not noting.losses


def test_scales_that_would_freeze_too_early_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"freeze_scales is 0.2, before start, 0.5"):
        qat(start=0.5, freeze_scales=0.2)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settle_in(tmp_path / "work", monkeypatch)
    return save_small_network(tmp_path / "network")


def write_config(network: Path, adapter: str, quantize: bool = False, **fields: Any) -> Path:
    callback = {"class_path": "lightllm.callbacks.QuantizationAwareTraining", "init_args": fields}
    config = {
        "run": "run",
        "trainer": {"max_steps": 4, "accelerator": "cpu", "callbacks": [callback]},
        "model": {
            "class_path": "lightllm.modules.FineTuning",
            "init_args": {
                "network": {
                    "class_path": "lightllm.models.Pretrained",
                    "init_args": {"name": str(network), "dtype": "float32"},
                },
                "adapter": {"class_path": f"lightllm.models.{adapter}"},
            },
        },
        "data": {
            "class_path": "lightllm.datamodules.ChatData",
            "init_args": {"train": str(save_chats(network.parent / "train.jsonl", 40)), "max_length": 128},
        },
    }
    file = Path("config.yaml")
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_run_of_the_command_is_exported_as_it_was_trained(network: Path, adapter: str) -> None:
    """Weights alone are rounded, so that the export is an ordinary network of the same logits."""
    config = write_config(network, adapter, scheme="int4_weight_only", group_size=16, start=0.25)
    lightllm("fit", "--config", config)
    lightllm("validate", "run", "--data.val", network.parent / "train.jsonl")
    lightllm("export", "run")
    loaded = load("run")
    assert all(quantizer(layer).enabled for layer in effective_layers(loaded.network).values())
    exported = AutoModelForCausalLM.from_pretrained("run/export")

    def logits(one: nn.Module) -> Tensor:
        with torch.no_grad():
            return one(token_rows(200)).logits

    torch.testing.assert_close(logits(exported), logits(loaded.network), rtol=1e-5, atol=1e-5)
    for name, layer in effective_layers(loaded.network).items():
        assert torch.equal(exported.get_submodule(name).weight, layer.effective_weight())
        assert not torch.equal(layer.masked_weight(), layer.effective_weight())


def test_bad_settings_are_refused_by_the_command(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(network, "QLoRA", scheme="int4_weight_only", group_size=16)
    assert "take LoRA instead of QLoRA" in refused(capsys, "fit", "--config", config)
    config = write_config(network, "Full", scheme="int4_weight_only", group_size=64, target="gguf")
    assert "group_size is 64, and GGUF has groups of 32" in refused(capsys, "fit", "--config", config)
