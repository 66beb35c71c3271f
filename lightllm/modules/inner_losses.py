"""What a student is to have in common with its teacher inside: between which layers, and how it is weighed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.losses import attention_relations, hidden_cosine, hidden_mse
from lightllm.models.anatomy import blocks, input_embedding, output_head
from lightllm.models.inner_states import InnerStates, Vectors, inner_states, layer_index

Positions = Literal["targets", "all"]
"""Where inner states are compared: at target tokens, or wherever there is no padding."""


@dataclass(frozen=True)
class HiddenStateLoss:
    """How near the student's hidden states come to the teacher's.

    Args:
        kind: `mse`, the mean square over the width, or `cosine`, 1 minus the cosine.
        weight: Of the mean over pairs of layers, in the loss.
        layers: Which layer of the student (0 the embedding, i the i-th block, -1 the last) learns from which of the
            teacher; None spreads all of the student's blocks evenly over the teacher's.
        positions: Where; with `all` the sum is still divided by the number of target tokens, as everything is.
    """

    kind: Literal["mse", "cosine"] = "mse"
    weight: float = 1.0
    layers: dict[int, int] | None = None
    positions: Positions = "targets"


@dataclass(frozen=True)
class EmbeddingLoss:
    """How near the student's embeddings of the tokens read come to the teacher's (TinyBERT, arXiv:1909.10351, eq. 9).

    Args:
        kind: As in `HiddenStateLoss`, like the others.
        weight: Of the mean over the width, in the loss.
        positions: Where.
    """

    kind: Literal["mse", "cosine"] = "mse"
    weight: float = 1.0
    positions: Positions = "targets"

    def as_hidden_states(self) -> HiddenStateLoss:
        """The same, said of the first layer."""
        return HiddenStateLoss(self.kind, self.weight, {0: 0}, self.positions)


@dataclass(frozen=True)
class RelationLoss:
    """How alike positions relate to each other in attention (MiniLM v2, arXiv:2012.15828).

    Args:
        weight: Of the mean over vectors and pairs of blocks, in the loss.
        layers: Which block of the student, from 1, learns from which of the teacher; None is the last from the last.
        vectors: Whose relations: `query`, `key`, `value`.
        num_heads: Relation heads into which all vectors are cut; a divisor of the widths of both networks' vectors.
        positions: As in `HiddenStateLoss`.
    """

    weight: float = 1.0
    layers: dict[int, int] | None = None
    vectors: tuple[Vectors, ...] = ("query", "key", "value")
    num_heads: int = 1
    positions: Positions = "targets"


class InnerLosses(nn.Module):
    """The losses on inner states, with the projections that lead from the student's width to the teacher's.

    Args:
        hidden_states: Compare hidden states, or None.
        relations: Compare relations in attention, or None.
        embedding: Compare the embeddings, or None.

    Raises:
        ValueError: A weight is negative, or nothing is named to be compared.
    """

    def __init__(
        self,
        hidden_states: HiddenStateLoss | None,
        relations: RelationLoss | None,
        embedding: EmbeddingLoss | None = None,
    ) -> None:
        super().__init__()
        first = None if embedding is None else embedding.as_hidden_states()
        given = {"hidden_states": hidden_states, "embedding": first}
        self.hidden_states = {name: loss for name, loss in given.items() if loss is not None}
        self.relations = relations
        for loss in (hidden_states, first, relations):
            if loss is not None and (not loss.weight >= 0.0 or loss.layers == {}):
                raise ValueError(f"{loss}: give a weight of at least 0, and layers or null")
        if relations is not None and not relations.vectors:
            raise ValueError("relations.vectors is empty: give query, key, value or some of them")
        self.projections = nn.ModuleDict()
        self._hidden_maps: dict[str, dict[int, int]] = {}
        self._relation_map: dict[int, int] = {}

    @property
    def compares(self) -> bool:
        """Whether anything is compared."""
        return bool(self.hidden_states) or self.relations is not None

    def join(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find which layers belong together, and make a projection for each pair of other widths.

        Raises:
            ValueError: A network does not have a layer that is named.
        """
        sizes = len(blocks(student)), len(blocks(teacher))
        spread = {layer: round(layer * sizes[1] / sizes[0]) for layer in range(1, sizes[0] + 1)}
        self._hidden_maps = {
            name: _resolved(loss.layers or spread, student, teacher) for name, loss in self.hidden_states.items()
        }
        if self.relations is not None:
            self._relation_map = _resolved(self.relations.layers or {-1: -1}, student, teacher)
        for name, pairs in self._hidden_maps.items():
            for ours, theirs in pairs.items():
                widths = _width(student, ours), _width(teacher, theirs)
                if widths[0] != widths[1]:
                    self.projections[_projection_name(name, ours)] = nn.Linear(*widths, bias=False)

    def watch_student(self, network: nn.Module) -> AbstractContextManager[InnerStates]:
        """Keep what is compared of the student's calls within the context."""
        return self._watch(
            network, {ours for pairs in self._hidden_maps.values() for ours in pairs}, list(self._relation_map)
        )

    def watch_teacher(self, network: nn.Module) -> AbstractContextManager[InnerStates]:
        """Keep what is compared of the teacher's calls within the context."""
        hidden = {theirs for pairs in self._hidden_maps.values() for theirs in pairs.values()}
        return self._watch(network, hidden, list(self._relation_map.values()))

    def _watch(self, network: nn.Module, hidden: set[int], relations: list[int]) -> AbstractContextManager[InnerStates]:
        kinds = () if self.relations is None else self.relations.vectors
        return inner_states(network, sorted(hidden), [(layer, kind) for layer in relations for kind in kinds])

    def forward(self, student: InnerStates, teacher: InnerStates, batch: TextBatch) -> Tensor:
        """The weighted sum over positions, a scalar; 0 where nothing is compared."""
        total = torch.zeros((), device=batch["labels"].device)
        for name in self._hidden_maps:
            total = total + self._hidden_state_sum(name, student, teacher, batch)
        return total + self._relation_sum(student, teacher, batch)

    def _hidden_state_sum(self, name: str, student: InnerStates, teacher: InnerStates, batch: TextBatch) -> Tensor:
        loss, pairs = self.hidden_states[name], self._hidden_maps[name]
        function = hidden_mse if loss.kind == "mse" else hidden_cosine
        chosen = _chosen(batch, loss.positions)
        total = torch.zeros((), device=chosen.device)
        for ours, theirs in pairs.items():
            hidden = _of_row(student.hidden[ours], batch)
            if _projection_name(name, ours) in self.projections:
                projection = self.projections[_projection_name(name, ours)]
                hidden = projection(hidden.to(next(projection.parameters()).dtype))
            total = total + function(hidden, teacher.hidden[theirs], chosen)
        return loss.weight / len(pairs) * total

    def _relation_sum(self, student: InnerStates, teacher: InnerStates, batch: TextBatch) -> Tensor | float:
        if self.relations is None:
            return 0.0
        chosen = _chosen(batch, self.relations.positions)
        document = (batch["position_ids"] == 0).cumsum(1)
        total: Tensor | float = 0.0
        for ours, theirs in self._relation_map.items():
            for kind in self.relations.vectors:
                pair = _of_row(student.vectors[ours, kind], batch), teacher.vectors[theirs, kind]
                total = total + attention_relations(*pair, document, chosen, self.relations.num_heads)
        return self.relations.weight / (len(self._relation_map) * len(self.relations.vectors)) * total


def _resolved(layers: dict[int, int], student: nn.Module, teacher: nn.Module) -> dict[int, int]:
    return {layer_index(student, ours): layer_index(teacher, theirs) for ours, theirs in layers.items()}


def _projection_name(loss: str, layer: int) -> str:
    """Of the projection from a layer of the student's, of which the embedding may have two."""
    return loss if loss == "embedding" else str(layer)


def _width(network: nn.Module, layer: int) -> int:
    return input_embedding(network).embedding_dim if layer == 0 else output_head(network).weight.shape[1]


def _chosen(batch: TextBatch, positions: Positions) -> Tensor:
    """Which positions count, bool `[batch, seq]`."""
    if positions == "targets":
        return batch["labels"] != IGNORE_INDEX
    return batch["document_ids"] != PADDING_DOCUMENT


def _of_row(states: Tensor, batch: TextBatch) -> Tensor:
    """States `[batch, seq, …]` without those of a learned prompt before the row."""
    return states[:, -batch["input_ids"].shape[1] :]
