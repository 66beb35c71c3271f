"""How good a network is: on text, per token, byte and document; and on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_log_probabilities, linear_token_statistics
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
    """Sum of -log2 p(target) per byte of UTF-8 that the targets stand for; None where they stand for none."""
    token_accuracy: float
    """Share of targets that have the highest probability."""
    num_tokens: int
    """Targets."""
    num_bytes: int
    """Bytes that the targets stand for."""


def evaluate_text(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, batches: Iterable[TextBatch]
) -> TextEvaluation:
    """Measure a network on batches of text; it is left in the mode that it was in.

    Args:
        network: A transformers causal language model, a peft model around one, or a user's own.
        tokenizer: The network's, for the bytes that tokens stand for.
        batches: Batches of any size.

    Raises:
        ValueError: There is no target in them.
    """
    table = bytes_per_token(tokenizer, vocabulary_size(network))
    loss_sum, num_tokens, num_correct, num_bytes = 0.0, 0, 0, 0
    with inference(network):
        for batch in batches:
            statistics = linear_token_statistics(*_head_inputs(network, batch), **_head_options(network))
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


def document_losses(network: nn.Module, batch: TextBatch) -> dict[int, tuple[float, int]]:
    """Sum of -log p(target) and number of targets of each document in a batch, by document id, in order.

    Args:
        network: As in `evaluate_text`.
        batch: One batch; a document may go on in the next one, whose sums are then to be added.
    """
    with inference(network):
        losses = -linear_log_probabilities(*_head_inputs(network, batch), **_head_options(network)).cpu()
    targets = batch["labels"].cpu() != IGNORE_INDEX
    documents, losses = batch["document_ids"].cpu()[targets], losses[targets].double()
    found: dict[int, tuple[float, int]] = {}
    for document in dict.fromkeys(documents.tolist()):
        own = losses[documents == document]
        found[document] = (float(own.sum()), len(own))
    return found


def write_document_losses(
    network: nn.Module, batches: Iterable[TextBatch], path: str | Path, describe: Callable[[int], str]
) -> int:
    """Write a JSONL row for each document with a target: `origin`, `loss` (nats a target token), `tokens`.

    The file appears whole or not at all.

    Args:
        network: As in `evaluate_text`.
        batches: Batches of documents; one that lies in several batches is put together again.
        path: The file.
        describe: Where a document comes from (`file.jsonl:17`), by its id.

    Returns:
        Number of rows.
    """
    sums: defaultdict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for batch in batches:
        for document, (loss, count) in document_losses(network, batch).items():
            sums[document] = (sums[document][0] + loss, sums[document][1] + count)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for document, (loss, count) in sums.items():
            row = {"origin": describe(document), "loss": loss / count, "tokens": count}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
    return len(sums)


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


def _head_inputs(network: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's matrix and labels, on the network's device and in one dtype."""
    device = network_device(network)
    moved: Any = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
    weight = output_head(network).weight
    hidden = hidden_states(network, moved)
    return hidden if torch.is_autocast_enabled(device.type) else hidden.to(weight.dtype), weight, moved["labels"]


def _head_options(network: nn.Module) -> dict[str, Any]:
    head = output_head(network)
    return {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
