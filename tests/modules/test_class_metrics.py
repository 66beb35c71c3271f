from __future__ import annotations

import pytest
import torch

from lightllm.modules.class_metrics import ClassMetrics


def test_numbers_are_those_of_a_plain_count() -> None:
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randint(4, (60,), generator=generator) for _ in range(2))
    losses = torch.rand(60)
    metrics = ClassMetrics()
    for part in (slice(0, 7), slice(7, 60)):
        metrics.update(losses[part], found[part], expected[part])
    values = {name: float(value) for name, value in metrics.compute().items()}
    scores = []
    for number in range(4):
        both = int(((found == number) & (expected == number)).sum())
        precision, recall = both / int((found == number).sum()), both / int((expected == number).sum())
        scores.append(2 * precision * recall / (precision + recall) if both else 0.0)
    assert values["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert values["accuracy"] == pytest.approx(float((found == expected).float().mean()))
    assert values["macro_f1"] == pytest.approx(sum(scores) / 4, rel=1e-5)
