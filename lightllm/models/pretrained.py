"""Networks with trained weights."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from typing_extensions import override

from lightllm.models.document_attention import implementation_for
from lightllm.models.inference import own_random_numbers
from lightllm.models.load import check_checkpoint_name, resolve_checkpoint
from lightllm.models.low_bit import keep_differentiable
from lightllm.models.network import (
    Attention,
    BuildRequest,
    Dtype,
    Network,
    Task,
    are_weights_to_come,
    torch_dtype,
)
from lightllm.models.progress import no_progress_bars

AUTO_CLASSES: dict[Task, type] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder": AutoModel,
}

_ARCHITECTURES = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": MODEL_FOR_MASKED_LM_MAPPING,
    "encoder": MODEL_MAPPING,
}


class Pretrained(Network):
    """A network with its trained weights.

    Args:
        name: A Hugging Face folder, a hub id, a GGUF file (read into an ordinary, trainable network), or a model
            that an installed package ships (`smollm2-135m-instruct`, `minilm-l6`).
        dtype: Of the weights; `auto` keeps the checkpoint's.
        attention: The attention implementation, see `Attention`.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run the Python code that comes with the checkpoint. Never done unless asked for.

    Raises:
        ValueError: `name` can be known to lead nowhere.
    """

    def __init__(
        self,
        name: str,
        dtype: Dtype = "auto",
        attention: Attention = "by_document",
        revision: str = "main",
        trust_remote_code: bool = False,
    ) -> None:
        check_checkpoint_name(name)
        self.name = name
        self.dtype: Dtype = dtype
        self.attention: Attention = attention
        self.revision = revision
        self.trust_remote_code = trust_remote_code

    @property
    @override
    def tokenizer_source(self) -> str | None:
        return self.name

    @property
    @override
    def restorable(self) -> bool:
        return True

    @override
    def build(self, request: BuildRequest) -> nn.Module:
        checkpoint = resolve_checkpoint(self.name)
        try:
            return self._load(checkpoint, request)
        except OSError as error:
            raise ValueError(f"cannot load {self.name!r}: {error}") from error

    def _load(self, checkpoint: str, request: BuildRequest) -> nn.Module:
        config = AutoConfig.from_pretrained(
            checkpoint, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        architecture = architecture_for(config, request.task)
        if request.task == "causal":
            _refuse_encoder(self.name, config, architecture)
        if are_weights_to_come() and request.quantization is None:
            return self._without_weights(checkpoint, config, request.task, architecture)
        require_masked_head(self.name, architecture, request.task, self.trust_remote_code)
        # What is downloaded shows how far it is; what is read from the disk takes a moment. A head that the checkpoint
        # does not have begins with random weights, and with the same ones every time: see `restorable`.
        with ExitStack() as stack:
            if Path(checkpoint).is_dir():
                stack.enter_context(no_progress_bars())
            if request.task != "causal":
                stack.enter_context(own_random_numbers(torch.device("cpu"), 0))
            network = AUTO_CLASSES[request.task].from_pretrained(  # type: ignore[attr-defined]
                checkpoint,
                dtype=torch_dtype(self.dtype),
                attn_implementation=implementation_for(self.attention, architecture),
                quantization_config=request.quantization,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        assert isinstance(network, nn.Module)
        return keep_differentiable(network)

    def _without_weights(
        self, checkpoint: str, config: PreTrainedConfig, task: Task, architecture: type[PreTrainedModel] | None
    ) -> nn.Module:
        """The same network on the meta device; where the dtype is the weights' own, it may be another one."""
        dtype = torch_dtype(self.dtype)
        with torch.device("meta"):
            network = AUTO_CLASSES[task].from_config(  # type: ignore[attr-defined]
                config,
                dtype=(config.dtype or torch.float32) if isinstance(dtype, str) else dtype,
                attn_implementation=implementation_for(self.attention, architecture),
                trust_remote_code=self.trust_remote_code,
            )
        assert isinstance(network, PreTrainedModel)
        if network.can_generate():
            with suppress(OSError):  # few checkpoints have none
                network.generation_config = GenerationConfig.from_pretrained(checkpoint, revision=self.revision)
        return network


def architecture_for(config: PreTrainedConfig, task: Task) -> type[PreTrainedModel] | None:
    """The class that transformers builds a configuration's network with; None if its code is not transformers' own."""
    found = _ARCHITECTURES[task].get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def require_masked_head(
    name: str, architecture: type[PreTrainedModel] | None, task: Task, own_code: bool = False
) -> None:
    """Refuse an architecture that can't say which token is masked.

    Args:
        name: What the user calls the network.
        architecture: As `architecture_for` found it.
        task: What is asked of it.
        own_code: The network brings its code with it, which may have such a head.

    Raises:
        ValueError: The task is `masked`, and the architecture has no head for it.
    """
    if task == "masked" and architecture is None and not own_code:
        raise ValueError(
            f"{name!r} has no head that predicts masked tokens: this objective needs an encoder, such as bert, roberta "
            "or modernbert"
        )


def _refuse_encoder(name: str, config: PreTrainedConfig, architecture: type[PreTrainedModel] | None) -> None:
    """A BERT loads as a causal model, with a random head and a mask that it never saw: nobody wants that."""
    architectures = config.architectures or []
    own = None if architecture is None else architecture.__name__
    if architectures and not any("CausalLM" in one or "LMHead" in one or one == own for one in architectures):
        raise ValueError(
            f"{name!r} is {', '.join(architectures)}, which does not predict the next token: this objective "
            "needs a causal language model"
        )
