"""A teacher's folder, chats, and a distillation whose teacher is asked beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from command_line import save_chats
from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.datamodules import Batches, ChatData, Reading
from lightllm.losses import Divergence
from lightllm.models import EveryNthLayer, Pretrained
from lightllm.modules import Distillation, Schedule, TeacherCache
from lightllm.teach import Taught, teach


def save_teacher(folder: Path) -> str:
    """A llama of four layers and 256 positions, with a chat tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    fields = tiny_llama(len(tokenizer)).config.to_dict() | {"num_hidden_layers": 4, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    return str(folder)


def chats(folder: Path, batches: Batches | None = None, **fields: Any) -> ChatData:
    """Twelve chats, two of them held out."""
    file = folder / "chats.jsonl"
    if not file.exists():
        save_chats(file, 12)
    fields = {"max_length": 64, "tokenizer": tiny_tokenizer()} | fields
    reading = Reading(val_fraction=0.2, cache=str(folder / "cache"), processes=1)
    return ChatData(str(file), batches=batches or Batches("packed", documents=3), reading=reading, **fields)


def distillation(teacher: str, cache: TeacherCache | None, **fields: Any) -> Distillation:
    """Every other layer of the teacher, trained towards it; the same each time."""
    torch.manual_seed(0)
    return Distillation(
        EveryNthLayer(teacher, 2, dtype="float32"),
        teacher=Pretrained(teacher, dtype="float32"),
        cached=cache,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
        schedule=Schedule(shape="constant", warmup=0),
        **fields,
    )


def ask(teacher: str, data: ChatData, cache: TeacherCache, divergence: Divergence | None = None) -> dict[str, Taught]:
    """Ask the teacher about the data."""
    return teach(distillation(teacher, cache, divergence=divergence), data)
