"""Distillation: a student learns from what its teacher predicts, and from how it comes to it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import Divergence, LogitTerms, linear_divergence
from lightllm.models.adapters import Adapter, Full, QLoRA
from lightllm.models.anatomy import output_head
from lightllm.models.hidden_states import check_packing, hidden_states
from lightllm.models.inner_states import InnerStates
from lightllm.models.load import load_tokenizer
from lightllm.models.network import BuildRequest, Network
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.build import BuildPlan, build_network, on_meta
from lightllm.modules.inner_losses import HiddenStateLoss, InnerLosses, RelationLoss
from lightllm.modules.token_metrics import TokenMetrics, sum_dtype


class DistillationMetrics(TokenMetrics):
    """The student's own `TokenMetrics`, and how far it still is from its teacher.

    divergence      mean over target tokens of the divergence that is trained, with its temperature
    """

    divergence_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("divergence_sum", torch.zeros((), dtype=sum_dtype()), dist_reduce_fx="sum")

    def add_divergence(self, divergence_sum: Tensor) -> None:
        """Add a batch's sum over target tokens, a scalar, beside the `update` with its other sums."""
        self.divergence_sum += divergence_sum

    @override
    def compute(self) -> dict[str, Tensor]:
        return super().compute() | {"divergence": (self.divergence_sum / self.num_targets).float()}


class Distillation(LanguageModule):
    """Train a student towards its teacher's distribution on the data's target tokens.

    The loss per target token is `divergence + hard_loss * cross-entropy`, and the losses on inner states. The teacher
    is frozen, computes as in evaluation, and is in no checkpoint if it can be built again. It is there with a trainer
    only: whoever builds the network from a run in order to use it has no need of it.

    Args:
        network: The student: `FromConfig`, `EveryNthLayer` of the teacher, or any other with the teacher's tokenizer.
        adapter: What of the student trains.
        teacher: Any causal network, in a dtype of its own.
        teacher_bits: Store the teacher's matrices in 4 bits (NF4) or 8 by bitsandbytes; None keeps its dtype.
        divergence: What is minimised, and at which temperature.
        hard_loss: Weight of the cross-entropy on the labels.
        hidden_states: Compare hidden states too; between other widths, learned projections lead to the teacher's.
        relations: Compare relations in attention too.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: A weight is negative, or nothing is named to be compared.
    """

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        teacher: Network,
        teacher_bits: Literal[4, 8] | None = None,
        divergence: Divergence | None = None,
        hard_loss: float = 0.0,
        hidden_states: HiddenStateLoss | None = None,
        relations: RelationLoss | None = None,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if not hard_loss >= 0.0:
            raise ValueError(f"hard_loss is {hard_loss}: give a weight of at least 0")
        self.teacher_network = teacher
        self.teacher_bits = teacher_bits
        self.divergence = divergence or Divergence()
        self.hard_loss = hard_loss
        self.inner = InnerLosses(hidden_states, relations)
        self.teacher: nn.Module | None = None
        self._student_states = InnerStates({}, {})

    @property
    @override
    def tokenizer_source(self) -> str | None:
        """The student's own, or the teacher's for a student from scratch."""
        return super().tokenizer_source or self.teacher_network.tokenizer_source

    @property
    def built_teacher(self) -> nn.Module:
        """The teacher, once `configure_model` has run within a trainer.

        Raises:
            RuntimeError: It has not.
        """
        if self.teacher is None:
            raise RuntimeError("the teacher is not built: it is from configure_model on, where there is a trainer")
        return self.teacher

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        if self._trainer is None:
            return
        self.teacher = self.teacher or self._build_teacher()
        self.inner.join(self.built_network, self.teacher)

    def _build_teacher(self) -> nn.Module:
        plan = BuildPlan(self.teacher_network, Full(), self.task, False, self.plan.compile)
        request = BuildRequest(self.task, self.tokenizer, _quantization(self.teacher_bits))
        teacher = build_network(plan, request).requires_grad_(False)
        if self._rows_are_packed() and not on_meta(teacher):
            check_packing(teacher)
        source = self.teacher_network.tokenizer_source
        if self.tokenizer is not None and source is not None:
            _check_tokenizers(self.tokenizer, load_tokenizer(source))
        self.announcements.make("teacher", teacher)
        return teacher

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        with self.inner.watch_student(self.built_network) as self._student_states:
            return super().forward(batch)

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        with self.inner.watch_teacher(self.built_teacher) as teacher_states:
            teacher_hidden = self._teacher_hidden(batch)
        divergence = self._divergence(hidden, teacher_hidden, batch["labels"], self.hard_loss)
        inner = self.inner(self._student_states, teacher_states, batch)
        self._student_states = InnerStates({}, {})
        return Loss(divergence + inner, (batch["labels"] != IGNORE_INDEX).sum())

    @override
    def new_metrics(self) -> Metric:
        return DistillationMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        hidden = self(batch)
        self._student_states = InnerStates({}, {})
        self.measure_tokens(hidden, batch)
        assert isinstance(self.metrics, DistillationMetrics)
        teacher_hidden = self._teacher_hidden(batch)
        self.metrics.add_divergence(self._divergence(hidden, teacher_hidden, batch["labels"]))

    @torch.no_grad()
    def _teacher_hidden(self, batch: TextBatch) -> Tensor:
        """The teacher's last hidden states `[batch, seq, teacher's hidden]`."""
        # It does not drop units out: it is one function, not a sample of many. Between its calls it is in the mode
        # of all the rest, because Lightning warns of a fit that begins otherwise.
        self.built_teacher.eval()
        hidden = hidden_states(self.built_teacher, batch)
        self.built_teacher.train(self.training)
        return hidden

    def _divergence(self, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, hard_loss: float = 0.0) -> Tensor:
        """The sum over target tokens. Vocabularies padded to two sizes are compared on what both have."""
        student, teacher = output_head(self.built_network), output_head(self.built_teacher)
        sizes = len(student.weight), len(teacher.weight)
        return linear_divergence(
            *(hidden, student.weight, teacher_hidden.to(teacher.weight.dtype), teacher.weight, labels),
            **vars(self.divergence),
            cross_entropy=hard_loss,
            num_tokens=None if sizes[0] == sizes[1] else min(sizes),
            student=LogitTerms(*student[1:]),
            teacher=LogitTerms(*teacher[1:]),
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        teacher = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("teacher.")}
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name not in teacher
        }
        super().on_save_checkpoint(checkpoint)
        if not self.teacher_network.restorable:  # another build would be another network
            checkpoint["state_dict"] |= teacher

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = dict(checkpoint["state_dict"])
        if self.teacher is None:  # the network alone is wanted
            state = {name: value for name, value in state.items() if not name.startswith(("teacher.", "inner."))}
        elif self.teacher_network.restorable:
            state |= {name: value for name, value in self.state_dict().items() if name.startswith("teacher.")}
        super().on_load_checkpoint(checkpoint | {"state_dict": state})


def _quantization(bits: Literal[4, 8] | None) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else QLoRA().quantization


def _check_tokenizers(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give a number to different tokens; one may have more tokens than the other.

    Raises:
        ValueError: They do: no divergence would compare the same tokens.
    """
    tokens = {index: token for token, index in theirs.get_vocab().items()}
    for token, index in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if tokens.get(index, token) != token:
            raise ValueError(
                f"token {index} is {token!r} in the data's tokenizer and {tokens[index]!r} in the teacher's, so their "
                "predictions cannot be compared token by token: leave data.tokenizer out with a student from scratch "
                "(FromConfig) or of the teacher's layers (EveryNthLayer), take a teacher with the student's "
                "tokenizer, or train on the teacher's answers as text (FineTuning)"
            )
