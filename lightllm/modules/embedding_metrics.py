"""What is measured of embeddings: whether texts that belong together find each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.retrieval import retrieval_recall, retrieval_reciprocal_rank
from torchmetrics.utilities import dim_zero_cat

from lightllm.batch import IGNORE_INDEX
from lightllm.modules.token_metrics import sum_dtype


class EmbeddingMetrics(Metric):
    """Retrieval over everything that was seen, by cosine, and the loss within batches.

    loss             mean over anchors
    recall_at_1      share of anchors whose positive is nearer than all other positives that were seen
    recall_at_10     share of anchors whose positive is among the ten nearest
    reciprocal_rank  mean of 1 / rank of the positive
    spearman         rank correlation of the cosines with the levels of similarity that the data gives, if it gives any

    Equal texts among the candidates count once, and that of the anchor itself is none.
    """

    full_state_update = False

    sums: Tensor
    anchors: list[Tensor]
    positives: list[Tensor]
    digests: list[Tensor]
    own_digests: list[Tensor]
    levels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=sum_dtype()), dist_reduce_fx="sum")
        for name in ("anchors", "positives", "digests", "own_digests", "levels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        losses: Tensor,
        anchors: Tensor,
        positives: Tensor,
        digests: Tensor,
        own_digests: Tensor,
        levels: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            losses: Of its anchors, `[anchors]`.
            anchors: Embeddings `[pairs, width]`, none where texts are not in pairs.
            positives: Embeddings `[pairs, width]`.
            digests: Of the positives' texts, `[pairs]`.
            own_digests: Of the anchors' texts, `[pairs]`.
            levels: Of the pairs' similarity, `[pairs]`, `IGNORE_INDEX` where there is none.
        """
        count = torch.tensor(len(losses), device=losses.device)
        # Not in place: `Trainer.validate` resets the sums in inference mode, and `fit` goes on with them out of it.
        self.sums = self.sums + torch.stack([losses.sum(), count])
        self.anchors.append(F.normalize(anchors.float(), dim=1))
        self.positives.append(F.normalize(positives.float(), dim=1))
        self.digests.append(digests)
        self.own_digests.append(own_digests)
        self.levels.append(levels)

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name; those that the data has nothing for are left out."""
        values = {"loss": (self.sums[0] / self.sums[1]).float()}
        anchors, positives, digests, own, levels = (
            dim_zero_cat(state) for state in (self.anchors, self.positives, self.digests, self.own_digests, self.levels)
        )
        if not len(anchors):
            return values
        texts, text = digests.unique(return_inverse=True)
        candidates = torch.zeros(len(texts), positives.shape[1], dtype=sum_dtype(), device=positives.device)
        candidates[text] = positives.to(candidates.dtype)  # equal texts have equal embeddings
        others = texts != own[:, None]
        found = [
            _search(anchor, candidates[other], texts[other] == digest)
            for anchor, other, digest in zip(anchors, others, digests, strict=True)
        ]
        recall_at_1, recall_at_10, reciprocal_rank = torch.stack(found).float().mean(0)
        values |= {"recall_at_1": recall_at_1, "recall_at_10": recall_at_10, "reciprocal_rank": reciprocal_rank}
        said = levels != IGNORE_INDEX
        if said.sum() > 1:
            cosines = (anchors * positives).sum(1)
            values["spearman"] = spearman_corrcoef(cosines[said], levels[said].float())
        return values


def _search(anchor: Tensor, candidates: Tensor, relevant: Tensor) -> Tensor:
    """Recall at 1 and at 10, and the reciprocal rank, of one anchor, whose positive is the relevant candidate."""
    cosines = 2 + candidates @ anchor.to(candidates.dtype)  # torchmetrics takes what is not positive for not found
    return torch.stack(
        [
            retrieval_recall(cosines, relevant, top_k=1),
            retrieval_recall(cosines, relevant, top_k=10),
            retrieval_reciprocal_rank(cosines, relevant),
        ]
    )
