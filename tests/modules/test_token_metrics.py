from __future__ import annotations

import math

import pytest
import torch
from tiny_networks import tiny_llama, token_rows
from torch import nn
from torchmetrics.text import Perplexity

from lightllm.batch import IGNORE_INDEX
from lightllm.losses import linear_token_statistics
from lightllm.modules.token_metrics import TokenMetrics, sum_dtype


def test_numbers_are_those_of_torchmetrics_over_unequal_batches() -> None:
    network = tiny_llama()
    metrics, perplexity = TokenMetrics(), Perplexity(ignore_index=IGNORE_INDEX)
    right = total = 0
    for rows, length, ignored in ((3, 9, 0), (1, 17, 12), (2, 5, 4)):
        ids = token_rows(rows=rows, length=length + 1)
        labels = ids[:, 1:].clone()
        labels[:, :ignored] = IGNORE_INDEX
        with torch.no_grad():
            hidden = network.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = network.lm_head(hidden)
        labels[0, -1] = logits[0, -1].argmax()  # some are right
        metrics.update(*linear_token_statistics(hidden, network.lm_head.weight, labels), torch.tensor(7))
        perplexity.update(logits, labels)
        inside = labels != IGNORE_INDEX
        right += int((logits.argmax(-1)[inside] == labels[inside]).sum())
        total += int(inside.sum())
    values = metrics.compute()
    assert float(values["perplexity"]) == pytest.approx(float(perplexity.compute()), rel=1e-5)
    assert float(values["loss"]) == pytest.approx(math.log(float(perplexity.compute())), rel=1e-6)
    assert float(values["token_accuracy"]) == pytest.approx(right / total)
    assert float(values["bits_per_byte"]) == pytest.approx(float(values["loss"]) * total / math.log(2) / 21, rel=1e-6)
    assert all(value.dtype == torch.float32 for value in values.values())


def test_without_bytes_there_are_no_bits_per_byte() -> None:
    metrics = TokenMetrics()
    metrics.update(*(torch.tensor(number) for number in (3.0, 2, 1, 0)))
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx({"loss": 1.5, "perplexity": math.exp(1.5), "token_accuracy": 0.5})


def test_many_small_batches_keep_their_digits() -> None:
    assert sum_dtype() == torch.float64
    metrics = TokenMetrics()
    metrics.update(torch.tensor(2.0**25), torch.tensor(2**25), torch.tensor(0), torch.tensor(0))
    for _ in range(100):
        metrics.update(torch.tensor(0.25), torch.tensor(0), torch.tensor(0), torch.tensor(0))
    assert float(metrics.loss_sum) == 2.0**25 + 25


def test_sums_are_what_ranks_exchange() -> None:
    """All states are sums, so that ranks with more targets count more."""
    metrics = TokenMetrics()
    assert set(metrics._reductions) == {"loss_sum", "num_targets", "num_correct", "num_bytes"}
    assert {function.__name__ for function in metrics._reductions.values()} == {"dim_zero_sum"}  # type: ignore[union-attr]
    metrics.update(*(torch.tensor(number) for number in (3.0, 2, 1, 0)))
    metrics.reset()
    assert float(metrics.loss_sum) == 0
    assert not list(nn.Module.state_dict(metrics))  # and none is in a checkpoint


def test_counts_stay_exact_in_a_module_of_half_precision() -> None:
    metrics = torch.nn.ModuleDict({"metrics": TokenMetrics()}).to(torch.bfloat16)["metrics"]
    for _ in range(3):
        metrics.update(torch.tensor(2.5), torch.tensor(1001), torch.tensor(1), torch.tensor(0))
    assert float(metrics.num_targets) == 3003
    metrics.reset()
    metrics.update(torch.tensor(2.5), torch.tensor(1001), torch.tensor(1), torch.tensor(0))
    assert float(metrics.num_targets) == 1001
