"""Networks: where they come from, how they are adapted, and how they are built inside."""

from lightllm.models.adapters import Adapter, DoRA, Frozen, Full, LinearProbe, LoRA, Prefix, PromptTuning, QLoRA, RsLoRA
from lightllm.models.from_config import FromConfig
from lightllm.models.from_module import FromModule
from lightllm.models.layer_subset import EveryNthLayer
from lightllm.models.load import load_tokenizer, resolve_checkpoint
from lightllm.models.network import BuildRequest, Network
from lightllm.models.pretrained import Pretrained
from lightllm.models.transformation import Record, Transformation, TransformationKind

__all__ = [
    "Adapter",
    "BuildRequest",
    "DoRA",
    "EveryNthLayer",
    "FromConfig",
    "FromModule",
    "Frozen",
    "Full",
    "LinearProbe",
    "LoRA",
    "Network",
    "Prefix",
    "Pretrained",
    "PromptTuning",
    "QLoRA",
    "Record",
    "RsLoRA",
    "Transformation",
    "TransformationKind",
    "load_tokenizer",
    "resolve_checkpoint",
]
