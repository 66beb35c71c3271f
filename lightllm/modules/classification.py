"""Classifying texts: an embedding, and a matrix that has a row for each class."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.models.adapters import Adapter
from lightllm.models.network import Network, Task
from lightllm.models.pooling import (
    Pooling,
    TextClassifier,
    embedding_width,
    embeddings,
    prepare_to_embed,
    remember_pooling,
)
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.class_metrics import ClassMetrics
from lightllm.modules.text_groups import at_labels, classes_of_texts
from lightllm.parallel.spreading import require_equal_calls


class SequenceClassification(LanguageModule):
    """Learn which class a text is of, from `ClassificationData`.

    With `LinearProbe` as the adapter, each training text is embedded once, without dropout.

    Args:
        network: An encoder or a decoder, of which the head is left away.
        adapter: What of it trains: `LinearProbe`, `Full`, `LoRA`, …; the classifier always does.
        pooling: What of a text's hidden states its embedding is: their mean, or that of the first or last token.
        label_smoothing: Probability that the right class gives up to all classes, evenly.
        common: The other fields of `LanguageModule`.
    """

    task: ClassVar[Task] = "encoder"

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        pooling: Pooling = "mean",
        label_smoothing: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}: give a share of at least 0 and less than 1")
        self.pooling: Pooling = pooling
        self.label_smoothing = label_smoothing
        self.classes: list[str] = []
        """Their names, by their numbers, as the data or a checkpoint has them."""
        self.classifier: nn.Linear | None = None
        self._bidirectional = False
        self._embedded: dict[int, Tensor] = {}

    @override
    def setup(self, stage: str) -> None:
        require_equal_calls(self.trainer.strategy, "SequenceClassification", "keeps what a frozen network gave")
        super().setup(stage)
        self.classes = list(getattr(getattr(self.trainer, "datamodule", None), "classes", self.classes))

    @override
    def configure_model(self) -> None:
        if self.network is None:
            super().configure_model()
            self._bidirectional = prepare_to_embed(self.built_network, self._rows_are_packed())
            remember_pooling(self.built_network, self.pooling, None)
        if self.classifier is None and self.classes:
            self.classifier = nn.Linear(embedding_width(self.built_network), len(self.classes))
            nn.init.zeros_(self.classifier.weight)  # at first, no class is likelier than another
            nn.init.zeros_(self.classifier.bias)

    @property
    def built_classifier(self) -> nn.Linear:
        """The matrix of the classes.

        Raises:
            ValueError: Nobody has said which classes there are.
        """
        if self.classifier is None:
            raise ValueError("the data does not say which classes there are: use ClassificationData")
        return self.classifier

    @property
    def text_classifier(self) -> TextClassifier | None:
        """The classifier for whoever exports it; None before it is built."""
        if self.classifier is None:
            return None
        return TextClassifier(self.classifier.weight, self.classifier.bias, self.classes, normalized=False)

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        """Scores of the classes, `[documents, classes]`, in the order of the documents' ids."""
        classifier = self.built_classifier
        scores: Tensor = classifier(self._embeddings(batch).to(classifier.weight.dtype))
        return scores

    def _embeddings(self, batch: TextBatch) -> Tensor:
        network = self.built_network
        if any(parameter.requires_grad for parameter in network.parameters()):
            return embeddings(network, batch, self.pooling, self._bidirectional).vectors
        with torch.no_grad():
            if not self.training:
                return embeddings(network, batch, self.pooling, self._bidirectional).vectors
            ids = [one for one in batch["document_ids"].unique().tolist() if one >= 0]
            if not all(one in self._embedded for one in ids):
                network.eval()  # it is one function, not a sample of many
                vectors, _ = embeddings(network, batch, self.pooling, self._bidirectional)
                network.train()
                self._embedded |= dict(zip(ids, vectors, strict=True))
            return torch.stack([self._embedded[one] for one in ids])

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        """The loss of scores `[documents, classes]`, and how many texts have a class."""
        classes = classes_of_texts(batch)
        total = F.cross_entropy(
            hidden.float(),
            classes,
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return Loss(total, (classes != IGNORE_INDEX).sum())

    @override
    def new_metrics(self) -> Metric:
        return ClassMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        classes = classes_of_texts(batch)
        known = classes != IGNORE_INDEX
        scores, classes = self(batch).float()[known], classes[known]
        self.metrics.update(F.cross_entropy(scores, classes, reduction="none"), scores.argmax(1), classes)

    @override
    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Log probability of each text's class at its label's position, `[batch, seq]`, 0 elsewhere; in nats."""
        return at_labels(self(batch).float().log_softmax(1), batch)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = self.classes

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.classes and self.classes != checkpoint["classes"]:
            raise ValueError(f"the data has the classes {self.classes}, the checkpoint {checkpoint['classes']}")
        self.classes = checkpoint["classes"]
        self.configure_model()
        super().on_load_checkpoint(checkpoint)
