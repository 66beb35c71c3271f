"""How much heads, neurons, hidden channels and layers matter: the less, the earlier they are taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.compression.structure import Axis, Structure, Weight
from lightllm.compression.token_watch import See, TokenWatch, on_device_of, real_positions
from lightllm.losses import linear_cross_entropy
from lightllm.models.anatomy import output_head
from lightllm.models.hidden_states import hidden_states
from lightllm.models.inference import inference

Importance = Literal["activation", "taylor", "magnitude"]


class Scores(NamedTuple):
    """A number for each unit, float64; it compares layers, heads or neurons of one layer, and channels."""

    layers: Tensor
    """`[layers]`."""
    heads: Tensor
    """`[layers, heads]`, of key/value heads with their query heads."""
    neurons: Tensor
    """`[layers, neurons]`."""
    channels: Tensor
    """`[channels]`."""


def scores(structure: Structure, importance: Importance, batches: Sequence[TextBatch]) -> Scores:
    """Measure all units of a network, which stays as it is.

    Args:
        structure: The network.
        importance: By `activation_scores`, `taylor_scores` or `magnitude_scores`.
        batches: Calibration data, of which magnitude needs none. Padding does not count.

    Raises:
        ValueError: There is no calibration data, and the importance needs some.
    """
    if importance == "magnitude":
        return magnitude_scores(structure)
    if not any(bool(real_positions(batch).any()) for batch in batches):
        raise ValueError(
            f"importance by {importance} is measured on data, and there is none: calibrate on at least one document, "
            "or take magnitude"
        )
    return (activation_scores if importance == "activation" else taylor_scores)(structure, batches)


def magnitude_scores(structure: Structure) -> Scores:
    """The sum of the squares of a unit's weights, which needs no data."""
    return _sums_by_unit(structure, lambda weight: weight.parameter.detach().float().square())


def taylor_scores(structure: Structure, batches: Sequence[TextBatch]) -> Scores:
    """How far the loss moves without a unit, to first order: the sum of |weight x gradient| over its weights.

    The gradient is that of a batch's mean loss per target token, and a score is the mean over batches
    (arXiv:1906.10771; for language models arXiv:2305.11627).
    """
    network, total = structure.network, _zeros(structure)
    trains = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        network.requires_grad_(True)
        for batch in batches:
            for sums, one in zip(total, _changes(structure, on_device_of(network, batch)), strict=True):
                sums += one / len(batches)
    finally:
        network.requires_grad_(False)
        for parameter in trains:
            parameter.requires_grad_(True)
    return total


def activation_scores(structure: Structure, batches: Sequence[TextBatch]) -> Scores:
    """How much a unit does to the residual stream, on the mean over tokens.

    layers      1 - the cosine of the stream before and after the layer: block influence (arXiv:2403.03853)
    heads       norm of what the key/value head's query heads add to the stream together
    neurons     norm of what the neuron adds to the stream
    channels    absolute value behind a norm, summed over the norms (arXiv:2407.14679)
    """
    total, watch = _zeros(structure), TokenWatch(structure.network)
    for index, layer in enumerate(structure.layers):
        output, down = layer.get_submodule("self_attn.o_proj"), layer.get_submodule("mlp.down_proj")
        watch.on(layer, _adding(total.layers[index], lambda before, after: 1 - cosine_similarity(before, after)))
        watch.on(output, _adding(total.heads[index], _head_norms(output, structure.sizes.heads)))
        watch.on(down, _adding(total.neurons[index], _neuron_norms(down)))
    for norm in structure.norms:
        watch.on(norm, _adding(total.channels, lambda _, after: after.abs()))
    num_tokens = watch.run(batches)
    return Scores(*(sums / max(num_tokens, 1) for sums in total))


def norm_factors(structure: Structure, channels: Tensor, batches: Sequence[TextBatch]) -> Tensor:
    """By what each norm's weights must be multiplied when only some channels stay: `[2 * layers + 1]`, float64.

    With x the stream before a norm, its root mean square over all channels is r, over those that stay r'. The norm
    would give x / r and gives x / r'; the one factor f that makes f x / r' nearest to it over all tokens, in the sense
    of least squares, is the mean of r' / r, because x / r' has the same length for every token.

    Args:
        structure: The network with all its channels.
        channels: The indices of those that stay.
        batches: Calibration data; with none, all channels are taken to be alike, and the factors are 1.
    """
    sums, watch = torch.zeros(len(structure.norms), dtype=torch.float64), TokenWatch(structure.network)

    tiny = structure.config.rms_norm_eps  # which the norms add too: some tokens' embedding is zero

    def ratios(before: Tensor, _: Tensor) -> Tensor:
        squares = before.square()
        of_kept = squares[:, channels.to(squares.device)]
        return ((of_kept.mean(-1) + tiny) / (squares.mean(-1) + tiny)).sqrt()

    for index, norm in enumerate(structure.norms):
        watch.on(norm, _adding(sums[index], ratios))
    num_tokens = watch.run(batches) if len(channels) < structure.sizes.channels else 0
    return sums / num_tokens if num_tokens else torch.ones_like(sums)


def _adding(sums: Tensor, values: Callable[[Tensor, Tensor], Tensor]) -> See:
    """Add `values(input, output)`, `[tokens, …]`, summed over tokens, to `sums`, `[…]`."""
    return lambda before, after: sums.add_(values(before, after).sum(0, dtype=torch.float64).cpu())


def _head_norms(output: nn.Module, num_heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Norms `[tokens, heads]` of what each key/value head adds, from the input of the output projection.

    Of its columns W for the head and its input z, it is the root of z' W' W z: what it adds is never formed.
    """
    weight = output.get_parameter("weight").float()
    columns = weight.unflatten(1, (num_heads, -1)).transpose(0, 1)  # [heads, channels, width]
    products = columns.transpose(1, 2) @ columns

    def norms(before: Tensor, _: Tensor) -> Tensor:
        by_head = before.unflatten(1, (num_heads, -1)).transpose(0, 1)  # [heads, tokens, width]
        return ((by_head @ products) * by_head).sum(-1).clamp(min=0).sqrt().T

    return norms


def _neuron_norms(down: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Norms `[tokens, neurons]` of what each neuron adds, from the input of the down projection."""
    column_norms = down.get_parameter("weight").float().norm(dim=0)
    return lambda before, _: before.abs() * column_norms


def _changes(structure: Structure, batch: TextBatch) -> Scores:
    """The sums of |weight x gradient| of one batch."""
    network, weights = structure.network, list(structure.weights())
    labels = batch["labels"]
    with inference(network), torch.enable_grad():
        hidden = hidden_states(network, batch)
        loss = linear_cross_entropy(hidden, labels=labels, **output_head(network)._asdict())
        loss = loss / (labels != IGNORE_INDEX).sum().clamp(min=1)
        gradients = dict(zip(weights, torch.autograd.grad(loss, [one.parameter for one in weights]), strict=True))
    return _sums_by_unit(structure, lambda weight: (weight.parameter.detach() * gradients[weight]).abs())


def _sums_by_unit(structure: Structure, elements: Callable[[Weight], Tensor]) -> Scores:
    """Sum numbers of all weights' elements, each of the weight's shape, over the weights of each unit."""
    total, num_heads = _zeros(structure), structure.sizes.heads
    for weight in structure.weights():
        values = elements(weight)
        if weight.layer is not None:
            total.layers[weight.layer] += values.sum(dtype=torch.float64).cpu()
        for dimension, axis in enumerate(weight.axes):
            others = [other for other in range(values.ndim) if other != dimension]
            sums = (values.sum(others, dtype=torch.float64) if others else values.double()).cpu()
            if axis is Axis.CHANNEL:
                total.channels.add_(sums)
            elif axis is Axis.NEURON:
                total.neurons[weight.layer].add_(sums)
            elif axis is not Axis.OTHER:
                total.heads[weight.layer].add_(sums.unflatten(0, (num_heads, -1)).sum(-1))
    return total


def _zeros(structure: Structure) -> Scores:
    layers, heads, neurons, channels = structure.sizes
    shapes = (layers,), (layers, heads), (layers, neurons), (channels,)
    return Scores(*(torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes))
