"""What the verb plan does: from a configuration to a job, from the job to a table and an overlay."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from lightning.pytorch import LightningDataModule

from lightllm.cli.command import PlanningCommand
from lightllm.cli.configs import found_configs
from lightllm.cli.plan_request import Request
from lightllm.cli.plan_table import print_plan
from lightllm.datamodules import DocumentData, TrainTokenizer
from lightllm.models import FromConfig, FromModule, load_tokenizer
from lightllm.models.empty_network import empty_network
from lightllm.modules import LanguageModule
from lightllm.parallel.machine import Machine, machine
from lightllm.parallel.machine_here import machine_here
from lightllm.parallel.optimizer_cost import optimizer_cost
from lightllm.parallel.plan import Job, Planner
from lightllm.parallel.plan_overlay import overlay

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "bf16": torch.bfloat16}


def plan(request: Request, arguments: list[str]) -> None:
    """Read a configuration, rank the ways to spread it, show them, and write the best.

    Raises:
        ValueError: The configuration is wrong, or nothing can be planned for it; the message says why.
    """
    command = PlanningCommand("plan", found_configs(arguments))
    found = machine_here() if request.here else machine(request.hardware or "")
    length = length_of(command.datamodule)
    precision = str(command.config.trainer.precision)
    vocabulary = vocabulary_of(command.model, command.datamodule)
    job = job_of(command.model, length, request.document_tokens, precision, found, vocabulary)
    tokens = request.target_batch_tokens
    if tokens is None:
        rows = rows_of(command.datamodule)
        tokens = rows * job.length * command.config.trainer.accumulate_grad_batches * found.world_size
    planner = Planner(job, found)
    estimates = planner.rank(tokens)
    print_plan(planner, estimates, tokens, request.top)
    if request.write is None:
        return
    if not estimates[0].fits:
        raise ValueError(f"nothing is written to {request.write!r}: no way fits")
    content = yaml.safe_dump(overlay(estimates[0].layout, found, job), sort_keys=False)
    title = f"# Overlay: {estimates[0].layout.describe()} on {found.describe()}, as `lightllm plan` found it best.\n"
    Path(request.write).write_text(title + content, encoding="utf-8")
    print(f"written: {request.write}")


def job_of(
    module: LanguageModule,
    length: int,
    document: int | None,
    precision: str,
    where: Machine,
    vocabulary: int | None = None,
) -> Job:
    """What a configuration's parts have a device do.

    Args:
        module: The objective, whose network is not built.
        length: Positions in a row.
        document: Positions of a document; the row's when None.
        precision: Of the trainer.
        where: The machine.
        vocabulary: What a network from scratch takes over from the data.

    Raises:
        ValueError: The network cannot be looked at without being built.
    """
    built = module.plan
    bare, adapted = (empty_network(built.network, built.task, vocabulary) for _ in range(2))
    if precision in _TRUE:
        bare, adapted = bare.to(_TRUE[precision]), adapted.to(_TRUE[precision])
    adapted = built.adapter.attach(adapted)
    low_bit = None
    if built.adapter.quantization is not None:
        double = built.adapter.quantization.bnb_4bit_use_double_quant
        low_bit = 0.5 + (1 / 64 + 4 / 64 / 256 if double else 4 / 64)  # nibbles, and a scale for each 64
    trained = next((one.dtype for one in adapted.parameters() if one.requires_grad), torch.float32)
    return Job(
        bare=bare,
        adapted=adapted,
        adapter=built.adapter,
        length=length,
        document=min(document or length, length),
        optimizer=optimizer_cost(module.optimizer, trained, where.kind),
        autocast=_AUTOCAST.get(precision),
        is_compiled=built.compile,
        low_bit=low_bit,
    )


def length_of(data: LightningDataModule) -> int:
    """Positions in a row at most.

    Raises:
        ValueError: The data does not say.
    """
    if not isinstance(data, DocumentData):
        raise ValueError(f"{type(data).__name__} does not say how long rows are (max_length): nothing can be planned")
    return data.max_length


def rows_of(data: LightningDataModule) -> int:
    """Rows of a batch, all of them full."""
    if not isinstance(data, DocumentData):
        return 1
    if data.batches.documents is not None:
        return data.batches.documents
    return max(1, data.batches.tokens // data.max_length)


def vocabulary_of(module: LanguageModule, data: LightningDataModule) -> int | None:
    """Tokens that a network from scratch takes over from the data; None where it has its own."""
    if not isinstance(module.plan.network, (FromConfig, FromModule)):
        return None
    tokenizer = getattr(data, "tokenizer", None)
    if isinstance(tokenizer, TrainTokenizer):
        return tokenizer.vocab_size
    source = tokenizer if isinstance(tokenizer, str) else module.tokenizer_source
    if source is not None:
        return len(load_tokenizer(source))
    return None if tokenizer is None else len(tokenizer)
