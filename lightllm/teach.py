"""Asking a distillation's teacher once about its data, before training: what `lightllm teach` does."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from lightllm.datamodules import DocumentData
from lightllm.datamodules.cache import cached_folder
from lightllm.models import load_tokenizer
from lightllm.models.hidden_states import check_packing
from lightllm.modules import Distillation
from lightllm.modules.cached_teacher import documents_to_ask
from lightllm.teaching.store import TeacherStore
from lightllm.teaching.write import Asking


class Taught(NamedTuple):
    """What is on disk now for a split."""

    store: TeacherStore
    new: bool
    """Whether it was written now, and not there already."""


def teach(module: Distillation, data: DocumentData, device: torch.device | None = None) -> dict[str, Taught]:
    """Ask the teacher about every target token of the data, and keep its likeliest tokens on disk.

    Of several processes that do it at once, one asks and the others wait. The module has its network afterwards: make
    another to train.

    Args:
        module: A new objective whose teacher is `cached`.
        data: Its data, which is set up here; all splits that there are.
        device: Where to compute; the CPU when None.

    Returns:
        What is kept, by split.

    Raises:
        ValueError: The teacher is not cached, or the data cannot be asked about.
    """
    if module.cached is None:
        raise ValueError(
            "the teacher is not cached, so it is not asked beforehand: set model.init_args.cached, such as {k: 64}"
        )
    if data.tokenizer is None and module.tokenizer_source is not None:
        data.tokenizer = load_tokenizer(module.tokenizer_source)
    data.prepare_data()
    data.setup("fit")
    documents = documents_to_ask(data)
    module.tokenizer = data.loaded_tokenizer
    module.plan = module.plan._replace(compile=False, gradient_checkpointing=False)
    module.configure_model()
    lesson, packed = module.lesson(), data.batches.mode == "packed"
    teacher, student = module.build_teacher().to(device), module.built_network.to(device)
    if packed:
        check_packing(teacher)
        check_packing(student)
    asking = Asking(teacher, student, lesson, module.divergence, packed)
    taught = {}
    for split, place in lesson.folders(documents, module.cached.folder).items():
        new = not place.is_dir()
        fill = partial(asking.write, documents[split])
        cached_folder(place.parent.parent, place.parent.name, place.name, fill)
        taught[split] = Taught(TeacherStore(place), new)
    return taught
