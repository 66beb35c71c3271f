from __future__ import annotations

import pytest

from lightllm.cli.spelling import class_paths, fields_of, nearest


@pytest.mark.parametrize(
    ("name", "near"), [("lora", "LoRA"), ("Lroa", "LoRA"), ("LORA", "LoRA"), ("Pretraned", "Pretrained"), ("xyz", None)]
)
def test_the_nearest_name_whatever_its_case(name: str, near: str | None) -> None:
    assert nearest(name, ["LoRA", "DoRA", "Pretrained"]) == near


def test_classes_that_a_configuration_may_name() -> None:
    paths = class_paths()
    assert paths["LoRA"] == "lightllm.models.LoRA"
    assert paths["AdamW"] == "torch.optim.AdamW"
    assert paths["EarlyStopping"] == "lightning.pytorch.callbacks.EarlyStopping"
    assert not any(name.islower() for name in paths), "functions are no classes"


def test_fields_are_those_of_the_parents_too() -> None:
    fields = fields_of("lightllm.modules.FineTuning")
    assert {"network", "adapter", "label_smoothing", "gradient_checkpointing", "compile"} <= set(fields)
    assert not {"self", "common"} & set(fields)
    assert fields["schedule"] == "lightllm.modules.schedule.Schedule"
    assert fields["compile"] is None


def test_fields_of_a_dataclass_know_where_they_go_on() -> None:
    inner = fields_of("lightllm.datamodules.ChatData")["batches"]
    assert inner is not None
    assert set(fields_of(inner)) == {"mode", "tokens", "documents"}


def test_a_class_that_is_not_there_has_no_fields() -> None:
    assert fields_of("lightllm.modules.Nothing") == {}
    assert fields_of("nowhere.Nothing") == {}
