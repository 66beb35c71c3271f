"""Networks with trained weights."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from typing_extensions import override

from lightllm.models import document_attention  # noqa: F401  (registers `by_document` with transformers)
from lightllm.models.load import check_checkpoint_name, resolve_checkpoint
from lightllm.models.low_bit import keep_differentiable
from lightllm.models.network import Attention, BuildRequest, Dtype, Network, Task, torch_dtype

AUTO_CLASSES: dict[Task, type] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder": AutoModel,
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
        if request.task == "causal":
            _refuse_encoder(checkpoint, self)
        network = AUTO_CLASSES[request.task].from_pretrained(  # type: ignore[attr-defined]
            checkpoint,
            dtype=torch_dtype(self.dtype),
            attn_implementation=self.attention,
            quantization_config=request.quantization,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        assert isinstance(network, nn.Module)
        return keep_differentiable(network)


def _refuse_encoder(checkpoint: str, network: Pretrained) -> None:
    """A BERT loads as a causal model, with a random head and a mask that it never saw: nobody wants that."""
    config = AutoConfig.from_pretrained(
        checkpoint, revision=network.revision, trust_remote_code=network.trust_remote_code
    )
    architectures = config.architectures or []
    if architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise ValueError(
            f"{network.name!r} is {', '.join(architectures)}, which does not predict the next token: this objective "
            "needs a causal language model"
        )
