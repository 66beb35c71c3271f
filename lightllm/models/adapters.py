"""How a network is adapted: which of its weights train, and what is added. All but freezing is peft's.

Peft is imported when an adapter is attached: it takes a second, and `lightllm fit --help` has no need of it.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import BitsAndBytesConfig, PreTrainedModel
from typing_extensions import override

from lightllm.models.anatomy import OwnNetwork, blocks, input_embedding, transformers_network
from lightllm.models.network import Dtype, torch_dtype

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


class Adapter(ABC):
    """What is done to a network before it trains."""

    supports_packing: ClassVar[bool] = True
    """Whether rows may hold several documents."""
    supports_gradient_checkpointing: ClassVar[bool] = True
    """Whether blocks may be run again in the backward pass."""

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How the frozen weights are to be loaded; None is the network's own dtype."""
        return None

    @abstractmethod
    def attach(self, network: nn.Module) -> nn.Module:
        """Adapt `network` and return what trains: the same object or a peft model around it."""


class Full(Adapter):
    """Every weight trains."""

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        return network


class Frozen(Adapter):
    """Lower layers stay as they are: the rest trains.

    Args:
        num_blocks: How many blocks to freeze, from the first; negative counts from the last (`-1` leaves one free).
        embedding: Freeze the token embedding, and with it a head that is tied to it.
        parameters: Regular expressions; parameters whose name one of them matches somewhere are frozen too.

    Raises:
        ValueError: More blocks than there are, an expression that matches nothing, or nothing left to train.
    """

    def __init__(self, num_blocks: int = 0, embedding: bool = True, parameters: list[str] | None = None) -> None:
        self.num_blocks = num_blocks
        self.embedding = embedding
        self.parameters = parameters or []

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        if self.num_blocks:
            stack = blocks(network)
            if abs(self.num_blocks) > len(stack):
                raise ValueError(f"cannot freeze {self.num_blocks} blocks of a network of {len(stack)}")
            for block in stack[: self.num_blocks]:
                block.requires_grad_(False)
        if self.embedding:
            input_embedding(network).requires_grad_(False)
        for pattern in self.parameters:
            matches = [p for name, p in network.named_parameters() if re.search(pattern, name)]
            if not matches:
                raise ValueError(f"no parameter's name matches {pattern!r}, so nothing is frozen by it")
            for parameter in matches:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError("every parameter is frozen: nothing would train")
        return network


class LinearProbe(Adapter):
    """Nothing of the network trains, only what an objective puts on top of it: a classifier, say."""

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        return network.requires_grad_(False)


class _LowRank(Adapter):
    """What LoRA and its variants share: `W + scale * B @ A`, `A` `[rank, in]`, `B` `[out, rank]` (arXiv:2106.09685).

    Args:
        rank: Columns of `B` and rows of `A`.
        alpha: The update is scaled by `alpha / rank`.
        dropout: Probability of dropping an input of `A`.
        targets: Names of the linear layers that get one; `all-linear` is all but the head.
        modules_to_save: Names of modules that train in full and are saved with the adapter.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"a rank is at least 1, not {rank}")
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.modules_to_save = modules_to_save

    def _configuration(self) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # declared int, divided as a number
            lora_dropout=self.dropout,
            target_modules=self.targets,
            modules_to_save=self.modules_to_save,
        )

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        from lightllm.models.lora_linear import LoraLinear

        configuration = self._configuration()
        if isinstance(network, OwnNetwork):
            configuration.exclude_modules = _without_effect(network)
            # In evaluation, torch's own transformer layers would take the matrices past the layers that are adapted.
            torch.backends.mha.set_fastpath_enabled(False)
        if not getattr(network, "is_quantized", False):
            configuration._register_custom_module({nn.Linear: LoraLinear})
        return _peft(network, configuration)


class LoRA(_LowRank):
    """Low-rank updates of frozen weights (arXiv:2106.09685)."""


class RsLoRA(_LowRank):
    """LoRA scaled by `alpha / sqrt(rank)`, so that high ranks learn as fast as low ones (arXiv:2312.03732)."""

    @override
    def _configuration(self) -> LoraConfig:
        configuration = super()._configuration()
        configuration.use_rslora = True
        return configuration


class DoRA(_LowRank):
    """LoRA of the weights' directions, with their magnitudes trained apart (arXiv:2402.09353)."""

    @override
    def _configuration(self) -> LoraConfig:
        configuration = super()._configuration()
        configuration.use_dora = True
        return configuration


class QLoRA(_LowRank):
    """LoRA over weights that are stored in 4 bits, NF4 by bitsandbytes (arXiv:2305.14314). Works on a CPU too.

    Args:
        rank: As in `LoRA`.
        alpha: As in `LoRA`.
        dropout: As in `LoRA`.
        targets: As in `LoRA`.
        modules_to_save: As in `LoRA`.
        compute_dtype: In which the weights are multiplied once unpacked.
        double_quantization: Quantize the blocks' scales too: 0.4 bits a weight less.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
        compute_dtype: Dtype = "bfloat16",
        double_quantization: bool = True,
    ) -> None:
        super().__init__(rank, alpha, dropout, targets, modules_to_save)
        self.compute_dtype: Dtype = compute_dtype
        self.double_quantization = double_quantization

    @property
    @override
    def quantization(self) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=torch_dtype(self.compute_dtype),
        )


class Prefix(Adapter):
    """Learned keys and values before every row, in every layer (arXiv:2101.00190). Rows hold one document each.

    Args:
        num_tokens: Length of the prefix.
        projection: Train the prefix through a small network, which is dropped after.
    """

    supports_packing: ClassVar[bool] = False
    supports_gradient_checkpointing: ClassVar[bool] = False  # which gives up the cache that the prefix is in

    def __init__(self, num_tokens: int = 16, projection: bool = False) -> None:
        self.num_tokens = num_tokens
        self.projection = projection

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        from peft import PrefixTuningConfig

        transformers_network(network)
        return _peft(network, PrefixTuningConfig(num_virtual_tokens=self.num_tokens, prefix_projection=self.projection))


class PromptTuning(Adapter):
    """Learned embeddings before every row (arXiv:2104.08691). Rows hold one document each.

    Args:
        num_tokens: Length of the prompt.
    """

    supports_packing: ClassVar[bool] = False

    def __init__(self, num_tokens: int = 16) -> None:
        self.num_tokens = num_tokens

    @override
    def attach(self, network: nn.Module) -> nn.Module:
        from peft import PromptTuningConfig

        transformers_network(network)
        return _peft(network, PromptTuningConfig(num_virtual_tokens=self.num_tokens))


def _without_effect(network: OwnNetwork) -> list[str]:
    """Linear layers that an update cannot be put on, because their matrices are used past them.

    They are the head (of a transformers model, peft finds it by itself) and the output layer of torch's attention.
    """
    layers = network.named_modules()
    outputs = [name for name, module in layers if isinstance(module, NonDynamicallyQuantizableLinear)]
    return [f"module.{network.head}", *outputs]


def _peft(network: nn.Module, configuration: PeftConfig) -> nn.Module:
    from peft import TaskType, get_peft_model

    if isinstance(network, PreTrainedModel):
        configuration.task_type = TaskType.CAUSAL_LM if network.can_generate() else TaskType.FEATURE_EXTRACTION
    # Peft keeps the adapter in float32 beside half-precision weights: small updates would be rounded away.
    with warnings.catch_warnings():
        # It asks whether the network checkpoints its gradients by a name that transformers is retiring.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        # And it says that it puts right what only it can know: which layers are transposed, as GPT-2's are.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is .Conv1D.")
        adapted = get_peft_model(network, configuration)
    assert isinstance(adapted, nn.Module)
    return adapted
