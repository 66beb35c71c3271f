"""A network's linear layers, replaced by thin matrices: which, at what rank, from which text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.compression.calibration import change_layer_by_layer
from lightllm.compression.factored_linear import FactoredLinear, factored, replace_layers
from lightllm.compression.layers import prunable_layers
from lightllm.compression.low_rank import Spectrum, spectrum
from lightllm.compression.rank_choice import RankChoice, Shape
from lightllm.compression.second_order import SecondMoment
from lightllm.models.anatomy import unwrapped
from lightllm.models.low_bit import is_low_bit
from lightllm.models.transformation import Record, Transformation, TransformationKind


class LowRank(Transformation):
    """Thin matrices in the place of the blocks' linear layers; later builds make them by rank, for weights to come.

    Args:
        name: Of the transformation.
        choice: What decides the ranks.
        leave_out: Regular expressions of names of layers that stay whole.
        calibration: Gives the text whose inputs the layers are to be near on; None for plain components.
    """

    kind = TransformationKind.LOW_RANK
    changes_frozen_weights = True

    def __init__(
        self,
        name: str,
        choice: RankChoice,
        leave_out: list[str] | None = None,
        calibration: Callable[[], Sequence[TextBatch]] | None = None,
    ) -> None:
        super().__init__(name)
        self.choice = choice
        self.leave_out = leave_out
        self.calibration = calibration

    @override
    def apply(self, network: nn.Module, record: Record | None) -> Record:
        layers = decomposable_layers(network, self.leave_out)
        if record is not None:
            ranks: dict[str, int] = record["ranks"]
            replace_layers(network, {name: factored(layers[name], rank) for name, rank in ranks.items()})
            return record
        batches = self.calibration() if self.calibration is not None else None
        return {"ranks": decompose(network, layers, self.choice, batches)}


def decomposable_layers(network: nn.Module, leave_out: list[str] | None = None) -> dict[str, nn.Linear]:
    """The blocks' linear layers by name, less those that one of the expressions matches.

    Raises:
        ValueError: See `prunable_layers`; or the weights are stored in few bits.
    """
    layers: dict[str, nn.Linear] = {}
    for name, layer in prunable_layers(network, leave_out).items():
        if is_low_bit(layer) or type(layer) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, and only nn.Linear with a weight of ordinary numbers can be "
                "taken apart: leave it out, or take another adapter than QLoRA, which stores the weights in few bits"
            )
        layers[name] = layer
    return layers


def decompose(
    network: nn.Module,
    layers: Mapping[str, nn.Linear],
    choice: RankChoice,
    batches: Sequence[TextBatch] | None = None,
) -> dict[str, int]:
    """Replace layers by their thin matrices, in place.

    With text, every block is fitted to the inputs that the replaced blocks before it give, and the ranks are chosen by
    the inputs that the whole network gave.

    Args:
        network: A network without an adapter.
        layers: Of its blocks, by name.
        choice: What decides the ranks.
        batches: Text for components that matter on it; None for those of the weights alone.

    Returns:
        The ranks by name; layers that stay whole, as thin matrices would be no smaller, are not in it.

    Raises:
        ValueError: The choice does not fit the layers, nothing is left to replace, or the network cannot be calibrated.
    """
    values: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Linear, parts: Spectrum) -> None:
        values[name] = parts.values

    if choice.needs_values:
        _for_each_spectrum(network, layers, batches, note)
    ranks = choice.ranks({name: Shape(*layer.weight.shape) for name, layer in layers.items()}, values)
    if not ranks:
        raise ValueError("at no layer would two thin matrices be smaller than the whole one: lower energy or budget")

    def put(name: str, layer: nn.Linear, parts: Spectrum) -> None:
        replace_layers(network, {name: factored(layer, ranks[name], parts.factors(ranks[name]))})

    _for_each_spectrum(network, {name: layers[name] for name in ranks}, batches, put)
    return ranks


def _for_each_spectrum(
    network: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[TextBatch] | None,
    take: Callable[[str, nn.Linear, Spectrum], None],
) -> None:
    """Give out each layer with its components, of which one layer's are in memory at a time."""
    if batches is None:
        for name, layer in layers.items():
            take(name, layer, spectrum(layer.weight))
        return

    def change(name: str, layer: nn.Module, moment: SecondMoment) -> None:
        assert isinstance(layer, nn.Linear)
        take(name, layer, spectrum(layer.weight, moment.sum / moment.positions))

    change_layer_by_layer(network, batches, layers, SecondMoment, change)


class RankReport(NamedTuple):
    """What has become of a network's blocks."""

    num_factored: int
    """Layers in two thin matrices."""
    num_whole: int
    """Linear layers of the blocks that stayed whole."""
    parameters_before: int
    """Of the weights of the layers that were replaced."""
    parameters_after: int
    """Of the thin matrices in their place."""
    ranks: tuple[int, int]
    """The lowest and the highest."""

    def describe(self) -> str:
        """In one line."""
        low, high = self.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"low rank: {self.num_factored} layers of {self.parameters_before / 1e6:.4g}M weights are two thin "
            f"matrices of {self.parameters_after / 1e6:.4g}M ({ranks}); {self.num_whole} stay whole"
        )


def rank_report(network: nn.Module) -> RankReport:
    """Count what is factored in a network, adapted or not.

    Raises:
        ValueError: Nothing is.
    """
    thin = factored_layers(network)
    if not thin:
        raise ValueError("no layer of the network is in thin matrices")
    whole = [name for name in prunable_layers(network) if name.rpartition(".")[0] not in thin]
    shapes = {name: Shape(layer.out_features, layer.in_features) for name, layer in thin.items()}
    ranks = [layer.rank for layer in thin.values()]
    return RankReport(
        len(thin),
        len(whole),
        sum(shape.num_parameters for shape in shapes.values()),
        sum(rank * shape.num_parameters_per_rank for rank, shape in zip(ranks, shapes.values(), strict=True)),
        (min(ranks), max(ranks)),
    )


def factored_layers(network: nn.Module) -> dict[str, FactoredLinear]:
    """The layers that are two thin matrices, by name in the plain network."""
    modules: dict[str, Any] = dict(unwrapped(network).named_modules())
    return {name: module for name, module in modules.items() if isinstance(module, FactoredLinear)}
