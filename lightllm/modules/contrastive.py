"""Contrastive learning: texts that belong together are drawn near each other, and all others apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.losses import matryoshka_info_nce
from lightllm.models.adapters import Adapter
from lightllm.models.network import Network, Task
from lightllm.models.pooling import Embeddings, Pooling, embedding_width, embeddings, prepare_to_embed, remember_pooling
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.embedding_metrics import EmbeddingMetrics
from lightllm.modules.gathering import gather_rows
from lightllm.modules.text_groups import TextGroups, rows_by, text_groups
from lightllm.parallel.data_ranks import num_data_ranks
from lightllm.parallel.spreading import require_equal_calls


@dataclass(frozen=True)
class InfoNCE:
    """The loss: each anchor's positive is told from everything else in the batch, by cosine.

    Raises:
        ValueError: The temperature or a width is not positive.
    """

    temperature: float = 0.05
    """Cosines are divided by it before the softmax."""
    symmetric: bool = False
    """Have each positive's anchor told from the others too, and take the mean of both."""
    widths: list[int] = field(default_factory=list)
    """Matryoshka: embeddings are to be good cut to so many of their first numbers too, each width as much as another
    (arXiv:2205.13147); the whole width alone if empty."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"loss.temperature is {self.temperature}: give a positive number (0.05)")
        if any(width < 1 for width in self.widths):
            raise ValueError(f"loss.widths are {self.widths}: an embedding has at least one number")


class ContrastivePretraining(LanguageModule):
    """Learn embeddings of texts: from pairs, triplets or more (`PairData`), or from texts alone.

    Everything else in the batch is a negative of an anchor: the positives of the others, and all hard negatives; but
    not what has the very text of the anchor or of its positive.

    Args:
        network: A decoder or an encoder, of which the head is left away.
        adapter: What of it trains.
        pooling: What of a text's hidden states its embedding is: their mean, or that of the first or last token.
        loss: Temperature, symmetry, Matryoshka widths.
        positives: `given` by the data, or by `dropout`: every text is its own positive, embedded a second time with
            other units dropped (SimCSE, arXiv:2104.08821).
        rows_at_once: Rows that are in the network at once; their activations are computed anew in the backward pass
            (GradCache, arXiv:2101.06983), so that memory does not grow with the batch, and gradients are the same. All
            when None.
        across_ranks: Have the texts of all ranks as negatives.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: `rows_at_once` is not positive.
    """

    task: ClassVar[Task] = "encoder"

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        pooling: Pooling = "mean",
        loss: InfoNCE | None = None,
        positives: Literal["given", "dropout"] = "given",
        rows_at_once: int | None = None,
        across_ranks: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}: give at least 1, or null for all")
        self.pooling: Pooling = pooling
        self.loss = loss or InfoNCE()
        self.positives = positives
        self.rows_at_once = rows_at_once
        self.across_ranks = across_ranks
        self.text_length: int | None = None
        """Tokens of a text at most, as the data has it; an export says it too."""
        self._bidirectional = False

    @override
    def setup(self, stage: str) -> None:
        require_equal_calls(self.trainer.strategy, "ContrastivePretraining", "embeds rows a few at a time")
        super().setup(stage)
        self.text_length = getattr(getattr(self.trainer, "datamodule", None), "max_length", self.text_length)
        if self.network is not None:
            remember_pooling(self.network, self.pooling, self.text_length)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["text_length"] = self.text_length

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.text_length = checkpoint["text_length"]
        super().on_load_checkpoint(checkpoint)
        remember_pooling(self.built_network, self.pooling, self.text_length)

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        network = self.built_network
        self._bidirectional = prepare_to_embed(network, self._rows_are_packed())
        width = embedding_width(network)
        if self.loss.widths and max(self.loss.widths) > width:
            raise ValueError(f"loss.widths are {self.loss.widths}, but embeddings of this network have {width} numbers")
        remember_pooling(network, self.pooling, self.text_length)

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        """Embeddings `[documents, hidden]` in the order of the documents' ids."""
        if self.rows_at_once is None or not torch.is_grad_enabled():
            return self._embed(batch).vectors
        parts = [checkpoint(self._embed, part, use_reentrant=False) for part in rows_by(batch, self.rows_at_once)]
        order = torch.cat([ids for _, ids in parts]).argsort()
        return torch.cat([vectors for vectors, _ in parts])[order]

    def _embed(self, batch: TextBatch) -> Embeddings:
        return embeddings(self.built_network, batch, self.pooling, self._bidirectional)

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        """The loss of embeddings `[documents, hidden]`."""
        groups = text_groups(batch)
        others = self._again(hidden, batch) if self.positives == "dropout" else None
        losses = self._losses(hidden, others, groups, across_ranks=self._gathers())
        return Loss(losses.sum(), torch.tensor(len(losses), device=losses.device))

    def _again(self, vectors: Tensor, batch: TextBatch) -> Tensor:
        """The same texts with other units dropped.

        Raises:
            ValueError: The network drops none, so that there is nothing to learn from.
        """
        others = self(batch)
        if torch.equal(others, vectors):
            raise ValueError(
                "positives by dropout need a network that drops units out in training, and this one does not: set "
                "hidden_dropout_prob or the like in network.fields, or a dropout of the adapter"
            )
        return others

    def _losses(self, vectors: Tensor, others: Tensor | None, groups: TextGroups, across_ranks: bool) -> Tensor:
        """Of each anchor, `[anchors]`; `others` are second embeddings of the same texts, if these are the positives.

        Raises:
            ValueError: The texts are single ones, and none has a positive.
        """
        size, digests = groups.size, groups.digests
        if others is not None:
            anchors, candidates = vectors, others
            of_anchors = of_positives = of_candidates = digests
        elif size == 1:
            raise ValueError("the data has single texts, which have no positives: set positives to dropout")
        else:
            anchors = vectors[::size]
            candidates = torch.cat([vectors[column::size] for column in range(1, size)])
            of_anchors, of_positives = digests[::size], digests[1::size]
            of_candidates = torch.cat([digests[column::size] for column in range(1, size)])
        begin = 0
        if across_ranks:
            candidates, begin = gather_rows(candidates)
            of_candidates, _ = gather_rows(of_candidates)
        return matryoshka_info_nce(
            anchors,
            candidates,
            begin + torch.arange(len(anchors), device=anchors.device),
            self.loss.widths or [vectors.shape[1]],
            self.loss.temperature,
            excluded=(of_candidates == of_positives[:, None]) | (of_candidates == of_anchors[:, None]),
            symmetric=self.loss.symmetric,
        )

    def _gathers(self) -> bool:
        """Whether there are other ranks, with texts of their own."""
        if not self.across_ranks or self._trainer is None or self.trainer.world_size == 1:
            return False
        if num_data_ranks(self.trainer.strategy) != self.trainer.world_size:
            raise ValueError(
                "across_ranks needs different texts on every rank, and here some ranks share theirs: set it to false"
            )
        return True

    @override
    def new_metrics(self) -> Metric:
        return EmbeddingMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        vectors, groups = self(batch), text_groups(batch)
        alone = groups.size == 1
        losses = self._losses(vectors, vectors if alone else None, groups, across_ranks=False)
        pairs = vectors[:0] if alone else vectors
        assert isinstance(self.metrics, EmbeddingMetrics)
        self.metrics.update(
            losses,
            pairs[:: groups.size],
            pairs[1 :: groups.size],
            groups.digests[: len(pairs)][1 :: groups.size],
            groups.digests[: len(pairs)][:: groups.size],
            groups.levels if not alone else groups.levels[:0],
        )

    @override
    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        raise ValueError("an embedding says nothing of single tokens: run lightllm export, and embed with its folder")
