"""Prototypical networks: a class is the mean of its few examples, and a text is of the class that is nearest."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lightllm.batch import TextBatch, batch_to
from lightllm.losses import Distance, class_means, prototype_scores, scores_without_own
from lightllm.models.adapters import Adapter
from lightllm.models.inference import inference
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


class Episode(NamedTuple):
    """What a batch of `EpisodeData` says of its texts, in the order of their ids."""

    classes: Tensor
    """Within the episode, int64 `[documents]`."""
    query: Tensor
    """Whether a text is to be classified, and not one to learn its class from, bool `[documents]`."""


class PrototypicalNetwork(LanguageModule):
    """Classify by the nearest class mean (arXiv:1703.05175); new classes need examples, and no training.

    With `EpisodeData`, a batch is an episode: its support gives the means, its queries are classified. With
    `ClassificationData`, the means are those of all training texts, which are taken anew before each validation and are
    in the checkpoint; in training, each text is classified by the means of the others in its batch. `LinearProbe` as
    the adapter leaves the network as it comes, and only the scale of the distances is learned, which no text's class
    depends on.

    Args:
        network: An encoder or a decoder, of which the head is left away.
        adapter: What of it trains.
        pooling: What of a text's hidden states its embedding is: their mean, or that of the first or last token.
        distance: Squared Euclidean distance, or cosine.
        scale: By which distances are multiplied before the softmax, at first; it is learned. 1 in the paper.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: The scale is not positive.
    """

    task: ClassVar[Task] = "encoder"

    prototypes: Tensor
    """Means of the training texts' classes, `[classes, hidden]`; no rows before they are taken."""

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        pooling: Pooling = "mean",
        distance: Distance = "euclidean",
        scale: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if not scale > 0:
            raise ValueError(f"scale is {scale}: give a positive number")
        self.pooling: Pooling = pooling
        self.distance: Distance = distance
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.episodic = False
        """Whether batches are episodes, as the data says."""
        self.classes: list[str] = []
        """Names of the classes by their numbers, as the data or a checkpoint has them."""
        self._bidirectional = False

    @override
    def setup(self, stage: str) -> None:
        require_equal_calls(self.trainer.strategy, "PrototypicalNetwork", "embeds its shots between the steps")
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        self.episodic = getattr(datamodule, "ways", None) is not None
        self.classes = list(getattr(datamodule, "classes", self.classes))

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        self._bidirectional = prepare_to_embed(self.built_network, self._rows_are_packed())
        remember_pooling(self.built_network, self.pooling, None)
        self.register_buffer("prototypes", torch.zeros(0, embedding_width(self.built_network)))

    @property
    def text_classifier(self) -> TextClassifier | None:
        """The means as a matrix, for whoever exports it; None before they are taken, or before their names are known.

        Of the squared distance to a mean, what does not depend on the mean is left out: it is the same for all classes.
        """
        if not len(self.prototypes) or len(self.classes) != len(self.prototypes):
            return None
        scale, means = self.log_scale.detach().exp(), self.prototypes.nan_to_num()
        absent = torch.zeros(len(means), device=means.device)
        absent[self.prototypes.isnan().any(1)] = -torch.inf
        if self.distance == "cosine":
            return TextClassifier(scale * F.normalize(means, dim=1), absent, self.classes, normalized=True)
        return TextClassifier(2 * scale * means, absent - scale * means.square().sum(1), self.classes, normalized=False)

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        """Embeddings `[documents, hidden]`, in the order of the documents' ids."""
        return embeddings(self.built_network, batch, self.pooling, self._bidirectional).vectors

    def adapt(self, batches: list[TextBatch], num_classes: int | None = None) -> None:
        """Take the classes of these texts for those that there are, by their means.

        Args:
            batches: Labelled texts.
            num_classes: How many classes there are, if not all of them need be among the texts; no text is found to be
                of one that is not.
        """
        with inference(self.built_network):
            found = [
                (self(batch), classes_of_texts(batch)) for batch in (batch_to(one, self.device) for one in batches)
            ]
        vectors, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.prototypes = class_means(vectors, classes, num_classes or int(classes.max()) + 1)

    def scores(self, vectors: Tensor, prototypes: Tensor) -> Tensor:
        """Logits `[texts, classes]` of vectors `[texts, hidden]`."""
        scores = self.log_scale.exp() * prototype_scores(vectors, prototypes, self.distance)
        return scores.masked_fill(prototypes.isnan().any(1), -torch.inf)

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        """The loss of embeddings `[documents, hidden]`: of an episode's queries, or of each text by the others."""
        if self.episodic:
            scores, classes = self._of_episode(hidden, episode_of(batch))
        else:
            classes = classes_of_texts(batch)
            plain = scores_without_own(hidden, classes, int(classes.max()) + 1, self.distance)
            absent = plain.isinf()
            # Not multiplied by the scale, whose gradient would be no number.
            scores = (self.log_scale.exp() * plain.masked_fill(absent, 0.0)).masked_fill(absent, -torch.inf)
            judged = ~absent.gather(1, classes[:, None])[:, 0]
            scores, classes = scores[judged], classes[judged]
        return Loss(F.cross_entropy(scores, classes, reduction="sum"), torch.tensor(len(classes), device=hidden.device))

    def _of_episode(self, vectors: Tensor, episode: Episode) -> tuple[Tensor, Tensor]:
        """Logits of an episode's queries, and their classes."""
        classes, query = episode
        means = class_means(vectors[~query], classes[~query], int(classes.max()) + 1)
        return self.scores(vectors[query], means), classes[query]

    @override
    def new_metrics(self) -> Metric:
        return ClassMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        scores, classes = self._measured(batch)
        self.metrics.update(F.cross_entropy(scores, classes, reduction="none"), scores.argmax(1), classes)

    def _measured(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Logits of the texts that are to be classified, and their classes.

        Raises:
            ValueError: There are no means to classify by.
        """
        vectors = self(batch).float()
        if self.episodic:
            return self._of_episode(vectors, episode_of(batch))
        if not len(self.prototypes):
            raise ValueError("no class has a mean yet: fit on ClassificationData, or call adapt with labelled texts")
        return self.scores(vectors, self.prototypes), classes_of_texts(batch)

    @override
    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Log probability of each text's class at its label's position, `[batch, seq]`, 0 elsewhere; in nats.

        Raises:
            ValueError: The batch is an episode, whose texts have classes there only.
        """
        if self.episodic:
            raise ValueError("classes of an episode mean nothing outside of it: predict on ClassificationData")
        return at_labels(self._measured(batch)[0].log_softmax(1), batch)

    @override
    def on_validation_start(self) -> None:
        self._take_means()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._take_means():
            checkpoint["state_dict"]["prototypes"] = self.prototypes
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = self.classes

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.classes = checkpoint["classes"]
        self.prototypes = torch.zeros_like(checkpoint["state_dict"]["prototypes"], device=self.device)

    def _take_means(self) -> bool:
        """Those of the training texts, while there are any: whether there are."""
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        batches = datamodule.excerpt("train") if fitting and getattr(datamodule, "classes", None) else []
        if batches:
            self.adapt(batches, len(datamodule.classes))
        return bool(batches)


def episode_of(batch: TextBatch) -> Episode:
    """Read an episode off the labels of its texts: twice the class, and 1 more for a query.

    Raises:
        ValueError: A text has no label, or there are no queries, or a class of theirs has no support.
    """
    labels = classes_of_texts(batch)
    classes, query = labels // 2, labels % 2 == 1
    whole = bool((labels >= 0).all()) and bool(query.any())
    if not whole or not torch.isin(classes[query], classes[~query]).all():
        raise ValueError("the batch is no whole episode: use EpisodeData with batches of one document each")
    return Episode(classes, query)
