"""Distillation: a student learns from what its teacher predicts, and from how it comes to it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import (
    Divergence,
    LogitTerms,
    linear_cross_entropy,
    linear_divergence,
    linear_top_token_divergence,
)
from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inner_states import InnerStates
from lightllm.models.network import Network
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.cached_teacher import Answers, CachedTeacher, TeacherCache, check_cachable
from lightllm.modules.inner_losses import EmbeddingLoss, HiddenStateLoss, InnerLosses, RelationLoss
from lightllm.modules.on_policy import OnPolicy, check_answers, own_answers
from lightllm.modules.other_tokenizer import Counterpart, OtherTokenizer
from lightllm.modules.teacher_network import build_teacher, translator
from lightllm.modules.token_metrics import TokenMetrics, sum_dtype
from lightllm.parallel.spreading import require_equal_calls
from lightllm.teaching.key import Lesson

Knowledge = Tensor | Answers | Counterpart
"""What is known of a teacher's predictions."""


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
        self.divergence_sum = self.divergence_sum + divergence_sum  # not in place, as in `TokenMetrics`

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
        divergence: What is minimised, and at which temperature; `universal` for a teacher with another tokenizer, which
            reads the text of the data in its own tokens: the i-th target tokens of a document are compared, as many as
            both have, so give it a `hard_loss` too.
        hard_loss: Weight of the cross-entropy on the labels.
        hidden_states: Compare hidden states too; between other widths, learned projections lead to the teacher's.
        relations: Compare relations in attention too.
        embedding: Compare the embeddings of what is read too, projected likewise.
        cached: Ask the teacher once, by `lightllm teach`, and train without it: several times faster. Nothing but the
            likeliest tokens is known of it then, so some kinds of divergence and losses on inner states are refused.
        on_policy: Learn from the student's own answers in some of the training batches; `hard_loss` is of the others.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: A weight is negative, nothing is named to be compared, or a cached teacher cannot say what is asked.
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
        embedding: EmbeddingLoss | None = None,
        cached: TeacherCache | None = None,
        on_policy: OnPolicy | None = None,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if not hard_loss >= 0.0:
            raise ValueError(f"hard_loss is {hard_loss}: give a weight of at least 0")
        self.teacher_network = teacher
        self.teacher_bits = teacher_bits
        self.divergence = divergence or Divergence()
        self.hard_loss = hard_loss
        self.on_policy = on_policy
        self._answered_itself = False
        self.cached = cached
        if cached is not None:
            inner = {"hidden_states": hidden_states, "relations": relations, "embedding": embedding}
            check_cachable(self.divergence.kind, teacher, {**inner, "on_policy": on_policy})
        self.inner = InnerLosses(hidden_states, relations, embedding)
        self.teacher: nn.Module | None = None
        self.predictions: CachedTeacher | None = None
        self._translator: OtherTokenizer | None = None
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
        if self.on_policy is not None and self._trainer is not None:
            require_equal_calls(self.trainer.strategy, "on_policy", "has every rank write answers of its own length")
        super().configure_model()
        if self._trainer is None:
            return
        if self.cached is not None:
            if self.trainer.state.fn != TrainerFn.PREDICTING:
                data = getattr(self.trainer, "datamodule", None)
                self.predictions = CachedTeacher.open(self.lesson(), self.cached, data)
            return
        if self.on_policy is not None:
            check_answers(self.built_network, self.tokenizer)
        self.teacher = self.teacher or self.build_teacher()
        self.inner.join(self.built_network, self.teacher)
        if self.divergence.kind == "universal":
            source = self.teacher_network.tokenizer_source
            self._translator = translator(self.tokenizer, source, self.teacher)
            if self._translator is not None and self.inner.compares:
                raise ValueError(
                    "the teacher reads other tokens than the student, so that their inner states are not at the same "
                    "positions: leave out hidden_states, relations and embedding"
                )

    def build_teacher(self) -> nn.Module:
        """The teacher itself, for whoever trains beside it or asks it beforehand."""
        packed, compile = self._rows_are_packed(), self.plan.compile
        others = self.divergence.kind == "universal"
        teacher = build_teacher(self.teacher_network, self.tokenizer, self.teacher_bits, packed, compile, others)
        self.announcements.make("teacher", teacher)
        return teacher

    def lesson(self) -> Lesson:
        """What a cached teacher is asked, once the network is built.

        Raises:
            ValueError: The teacher is not cached.
        """
        if self.cached is None:
            raise ValueError("the teacher is not cached: set model.init_args.cached, such as {k: 64}")
        vocabulary = len(output_head(self.built_network).weight)
        temperature = self.divergence.temperature
        return Lesson(self.teacher_network, self.teacher_bits, self.cached.k, temperature, vocabulary)

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        with self.inner.watch_student(self.built_network) as self._student_states:
            return super().forward(batch)

    @override
    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        own = None
        if self.on_policy is not None:
            if float(torch.rand(())) < self.on_policy.share:
                assert self.tokenizer is not None
                own = own_answers(self.built_network, self.tokenizer, batch, self.on_policy)
            self.log("train/on_policy", float(own is not None))
        self._answered_itself = own is not None
        step = super().training_step(batch if own is None else own, batch_idx)
        self._answered_itself = False
        return step

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        known, teacher_states = self._ask(batch, "train")
        hard_loss = 0.0 if self._answered_itself else self.hard_loss
        divergence = self._divergence(hidden, known, batch["labels"], hard_loss)
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
        known, _ = self._ask(batch, "test" if self.trainer.testing else "val")
        self.metrics.add_divergence(self._divergence(hidden, known, batch["labels"]))

    @torch.no_grad()
    def _ask(self, batch: TextBatch, split: str) -> tuple[Knowledge, InnerStates]:
        """What the teacher knows: its last hidden states `[batch, seq, teacher's hidden]`, or what stands for them."""
        if self.predictions is not None:
            return self.predictions.answers(batch, split), InnerStates({}, {})
        teacher, translated = self.built_teacher, None
        if self._translator is not None:
            translated = self._translator(batch)
            batch = translated.batch
        # It does not drop units out: it is one function, not a sample of many. Between its calls it is in the mode
        # of all the rest, because Lightning warns of a fit that begins otherwise.
        teacher.eval()
        with self.inner.watch_teacher(teacher) as states:
            hidden = hidden_states(teacher, batch).to(output_head(teacher).weight.dtype)
        teacher.train(self.training)
        if translated is None:
            return hidden, states
        return Counterpart(hidden[batch["labels"] != IGNORE_INDEX], translated.labels), states

    def _divergence(self, hidden: Tensor, known: Knowledge, labels: Tensor, hard_loss: float = 0.0) -> Tensor:
        """The sum over target tokens. Vocabularies padded to two sizes are compared on what both have."""
        student, options = output_head(self.built_network), {**vars(self.divergence), "cross_entropy": hard_loss}
        terms = LogitTerms(*student[1:])
        if isinstance(known, Answers):
            given = (hidden, student.weight, known.tokens, labels)
            return linear_top_token_divergence(*given, num_tokens=known.vocabulary, student=terms, **options)
        teacher = output_head(self.built_teacher)
        options |= {"student": terms, "teacher": LogitTerms(*teacher[1:])}
        if isinstance(known, Counterpart):
            paired = known.labels != IGNORE_INDEX
            pairs = (hidden[paired], student.weight, known.hidden, teacher.weight, labels[paired])
            divergence = linear_divergence(*pairs, **{**options, "cross_entropy": 0.0})
            if not hard_loss:
                return divergence
            return divergence + hard_loss * linear_cross_entropy(hidden, labels=labels, **student._asdict())
        size = min(len(student.weight), len(teacher.weight))
        return linear_divergence(hidden, student.weight, known, teacher.weight, labels, num_tokens=size, **options)

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
