from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import refused

from lightllm.cli.explain import explain

NEAR_FIELDS = {
    "--model.network.nam": "model.network.nam: Pretrained has no field 'nam' (did you mean 'name'?)",
    "--model.adapter.rnk": "model.adapter.rnk: LoRA has no field 'rnk' (did you mean 'rank'?)",
    "--model.optimizer.lrr": "model.optimizer.lrr: AdamW has no field 'lrr' (did you mean 'lr'?)",
    "--model.schedule.warmpu": "model.schedule.warmpu: Schedule has no field 'warmpu' (did you mean 'warmup'?)",
    "--model.label_smothing": (
        "model.label_smothing: FineTuning has no field 'label_smothing' (did you mean 'label_smoothing'?)"
    ),
    "--model.gradient_checkpoint": (
        "model.gradient_checkpoint: FineTuning has no field 'gradient_checkpoint' "
        "(did you mean 'gradient_checkpointing'?)"
    ),
    "--data.trian": "data.trian: ChatData has no field 'trian' (did you mean 'train'?)",
    "--data.batches.mod": "data.batches.mod: Batches has no field 'mod' (did you mean 'mode'?)",
    "--data.reading.limt": "data.reading.limt: Reading has no field 'limt' (did you mean 'limit'?)",
    "--data.tokenizer.vocab_sise": (
        "data.tokenizer.vocab_sise: TrainTokenizer has no field 'vocab_sise' (did you mean 'vocab_size'?)"
    ),
    "--trainer.max_step": "there is no option --trainer.max_step (did you mean '--trainer.max_steps'?)",
    "--checkpoint.kep": "there is no option --checkpoint.kep (did you mean '--checkpoint.keep'?)",
    "--lgo": "there is no option --lgo (did you mean '--log'?)",
}

WRONG_VALUES = {
    ("--model.schedule.warmup", "abc"): "model.schedule.warmup: expected a number, not 'abc'",
    ("--model.schedule.floor", "3"): "floor is a share of the learning rate, between 0 and 1, not 3.0",
    ("--model.adapter.rank", "x"): "model.adapter.rank: expected a whole number, not 'x'",
    ("--model.adapter.rank", "0"): "a rank is at least 1, not 0",
    ("--model.optimizer.lr", "fast"): "model.optimizer.lr: expected a number, not 'fast'",
    ("--model.compile", "maybe"): "model.compile: expected true or false, not 'maybe'",
    ("--model.network", "null"): "model.network is missing",
    ("--data.batches.mode", "pakced"): (
        "data.batches.mode: expected packed or sorted, not 'pakced' (did you mean 'packed'?)"
    ),
    ("--data.reading.limit", "few"): "data.reading.limit: expected a whole number or null, not 'few'",
    ("--data.train", "{a: 3}"): "data.train: expected a text or list",
    ("--trainer.max_steps", "many"): "trainer.max_steps: expected a whole number, not 'many'",
    ("--log", "wandbb"): "log: expected csv, tensorboard or wandb, not 'wandbb' (did you mean 'wandb'?)",
    ("--data.train", "nothing.jsonl"): "data.train: no such file or folder: nothing.jsonl",
    ("--model.network.name", "./nothing"): "no such model file or folder: './nothing'",
    ("--model.network.name", "smollm2-135m-instuct"): (
        "no model 'smollm2-135m-instuct' (did you mean 'smollm2-135m-instruct'?)"
    ),
    ("extra",): "what is 'extra' for? Options begin with --",
}

UNKNOWN_CLASSES = {
    ("--model", "FineTunning"): "model: there is no class 'FineTunning' (did you mean 'FineTuning'?)",
    ("--model.network", "Pretrned"): "model.network: there is no class 'Pretrned' (did you mean 'Pretrained'?)",
    ("--model.adapter", "lora"): "model.adapter: there is no class 'lora' (did you mean 'LoRA'?)",
    ("--model.optimizer", "AdmW"): "model.optimizer: there is no class 'AdmW' (did you mean 'AdamW'?)",
    ("--data", "lightllm.datamodules.ChatDat"): (
        "data: there is no class 'lightllm.datamodules.ChatDat' (did you mean 'lightllm.datamodules.ChatData'?)"
    ),
    ("--data", "my_parts.MyData"): "data: there is no class 'my_parts.MyData': no module is called 'my_parts'",
    ("--trainer.callbacks+=lightllm.callbacks.GradientNorn",): (
        "trainer.callbacks: there is no class 'lightllm.callbacks.GradientNorn' "
        "(did you mean 'lightllm.callbacks.GradientNorm'?)"
    ),
}

OVERLAYS = {
    "modle: {class_path: lightllm.modules.FineTuning}": (
        "modle.class_path: a configuration has no 'modle' (did you mean 'model'?)"
    ),
    "trainer: {max_step: 3}": "trainer.max_step: Trainer has no field 'max_step' (did you mean 'max_steps'?)",
    "model: {init_args: {network: {init_args: {dtyp: float32}}}}": (
        "model.network.dtyp: Pretrained has no field 'dtyp' (did you mean 'dtype'?)"
    ),
    "trainer: {callbacks: [{class_path: SampleGenerations, init_args: {prompt: [a]}}]}": (
        "trainer.callbacks.prompt: SampleGenerations has no field 'prompt' (did you mean 'prompts'?)"
    ),
}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [*(((flag, "2"), told) for flag, told in NEAR_FIELDS.items()), *WRONG_VALUES.items(), *UNKNOWN_CLASSES.items()],
    ids=str,
)
def test_a_wrong_flag_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", "--config", material.recipe, *arguments)
    assert said.splitlines()[-1].startswith(f"lightllm fit: {told}")


@pytest.mark.parametrize(("overlay", "told"), OVERLAYS.items())
def test_a_wrong_line_of_a_configuration_is_told_in_one_line(
    overlay: str, told: str, material: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("overlay.yaml").write_text(overlay)
    assert refused(capsys, "fit", "--config", material.recipe, "--config", "overlay.yaml") == f"lightllm fit: {told}"


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    told = refused(capsys, "fit")
    assert told == "lightllm fit: data and model are missing: name a configuration with --config"


def test_a_message_of_another_form_stays_as_it_is() -> None:
    assert explain("Something new: 7", []) == "Something new: 7"
    assert explain("", []) == ""
