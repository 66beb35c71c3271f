"""What a student learns from inside its teacher: hidden states, and how positions relate in attention.

Every function gives a sum over positions, so that however a batch is cut, the parts add up. The teacher's tensors get
no gradient. Everything after the inputs is float32 (float64 for double inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_mse(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Sum, over the chosen positions, the mean square of the difference of two hidden states (arXiv:1909.10351).

    Args:
        student: Hidden states `[..., width]`, projected to the teacher's width where theirs is another.
        teacher: Hidden states `[..., width]`.
        chosen: Which positions count, bool `[...]`.

    Returns:
        A scalar.

    Raises:
        ValueError: if shapes don't fit together.
    """
    student, teacher = _chosen_pairs(student, teacher, chosen)
    return (student - teacher).square().mean(-1).sum()


def hidden_cosine(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Sum, over the chosen positions, 1 minus the cosine of two hidden states, in `[0, 2]` (arXiv:1910.01108).

    Arguments, result and errors are those of `hidden_mse`.
    """
    student, teacher = _chosen_pairs(student, teacher, chosen)
    return (1.0 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def attention_relations(
    student: Tensor, teacher: Tensor, document: Tensor, chosen: Tensor, num_heads: int, causal: bool = True
) -> Tensor:
    """Sum, over the chosen positions, how differently they relate to others in two networks (arXiv:2012.15828).

    The vectors of a layer's queries, keys or values, of all heads side by side, are cut anew into `num_heads` relation
    heads of d numbers, so that networks of other widths and head counts compare. A position t relates to position s by

        R_ts = softmax over s of (a_t . a_s / sqrt(d))

    and adds the mean over relation heads of KL(R of the teacher || R of the student). Softmaxes run over the positions
    of t's own document, in causal networks over those up to t: over what attention sees.

    Args:
        student: Queries, keys or values before any rotation `[batch, seq, student's width]`.
        teacher: The same of the teacher `[batch, seq, teacher's width]`.
        document: A number that is equal within a document of a row and differs between its documents `[batch, seq]`.
        chosen: Which positions count, bool `[batch, seq]`.
        num_heads: Into how many relation heads both are cut; memory is `[batch, num_heads, seq, seq]`, several times.
        causal: Whether a position relates to earlier ones only.

    Returns:
        A scalar.

    Raises:
        ValueError: if shapes don't fit together, or a width is no multiple of `num_heads`.
    """
    if student.shape[:-1] != teacher.shape[:-1] or student.shape[:-1] != chosen.shape:
        raise ValueError(
            f"the student's vectors {list(student.shape)}, the teacher's {list(teacher.shape)} and the positions "
            f"{list(chosen.shape)} don't fit together: give [batch, seq, width] twice, and [batch, seq]"
        )
    visible = document[:, :, None] == document[:, None, :]
    if causal:
        visible = visible.tril()
    with torch.no_grad():
        reference = _log_relations(teacher, visible, num_heads)
    # Where nothing is seen both are the same finite number, and the teacher's probability is 0.
    divergence = (reference.exp() * (reference - _log_relations(student, visible, num_heads))).sum(-1)
    return divergence.mean(1)[chosen].sum()


def _log_relations(vectors: Tensor, visible: Tensor, num_heads: int) -> Tensor:
    """Return log R `[batch, num_heads, seq, seq]` of vectors `[batch, seq, width]`."""
    width = vectors.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"vectors of {width} numbers cannot be cut into {num_heads} relation heads: give a divisor")
    heads = _wide(vectors).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / (width // num_heads) ** 0.5
    return scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min / 2).log_softmax(-1)


def _chosen_pairs(student: Tensor, teacher: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return both hidden states at the chosen positions, `[positions, width]`."""
    if student.shape != teacher.shape or student.shape[:-1] != chosen.shape:
        raise ValueError(
            f"the student's hidden states {list(student.shape)}, the teacher's {list(teacher.shape)} and the positions "
            f"{list(chosen.shape)} don't fit together: give [..., width] twice, and [...]"
        )
    return _wide(student[chosen]), _wide(teacher.detach()[chosen])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
