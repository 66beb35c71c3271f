"""How good a network is: on text, per token and byte; and on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_token_statistics
from lightllm.models.anatomy import output_head, vocabulary_size
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference, network_device
from lightllm.models.token_bytes import bytes_per_token


@dataclass(frozen=True)
class TextEvaluation:
    """What a network makes of a text; every mean is over all target tokens, never a mean of means."""

    loss: float
    """Mean of -log p(target), in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Sum of -log2 p(target) per byte of UTF-8 that the targets stand for; None where they stand for none, or where no
    tokenizer tells."""
    token_accuracy: float
    """Share of targets that have the highest probability."""
    num_tokens: int
    """Targets."""
    num_bytes: int
    """Bytes that the targets stand for."""


def evaluate_text(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase | None, batches: Iterable[TextBatch]
) -> TextEvaluation:
    """Measure a network on batches of text; it is left in the mode that it was in.

    Args:
        network: A transformers causal language model, a peft model around one, or a user's own.
        tokenizer: The network's, for the bytes that tokens stand for; without one, there are no bits per byte.
        batches: Batches of any size.

    Raises:
        ValueError: There is no target in them.
    """
    table = bytes_per_token(tokenizer, vocabulary_size(network))
    loss_sum, num_tokens, num_correct, num_bytes = 0.0, 0, 0, 0
    device, head = network_device(network), output_head(network)
    with inference(network):
        for batch in batches:
            moved: Any = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
            statistics = linear_token_statistics(
                hidden_states(network, moved).to(head.weight.dtype),
                head.weight,
                moved["labels"],
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            targets = batch["labels"][batch["labels"] != IGNORE_INDEX].cpu()
            loss_sum += float(statistics.loss_sum)
            num_tokens += int(statistics.weight)
            num_correct += int(statistics.num_correct)
            num_bytes += int(table[targets].sum())
    if num_tokens == 0:
        raise ValueError("there is nothing to evaluate: no batch has a target token")
    loss = loss_sum / num_tokens
    return TextEvaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else None,
        token_accuracy=num_correct / num_tokens,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


_LARGEST_EXPONENT = 700.0
"""Above it, exp overflows a float."""


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness on an exported folder.

    Args:
        folder: A Hugging Face folder, as `export` writes it.
        tasks: The tasks' names.
        include_path: A folder with the YAML files of further tasks; only those are looked at then.
        limit: Examples of each task, from its first; None is all.
        batch_size: Examples at once.
        device: Where to run.

    Returns:
        The metrics of each task, by name.

    Raises:
        ValueError: lm-eval is not installed, or a task is unknown.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("evaluating tasks needs the package lm-eval: pip install 'lightllm[evaluate]'") from error
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": device},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results["results"].items()
    }
