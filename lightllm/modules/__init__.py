"""Objectives: what a network is trained towards, one a file."""

from lightllm.masking import Masking
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.cached_teacher import TeacherCache
from lightllm.modules.causal import CausalPretraining, FineTuning
from lightllm.modules.classification import SequenceClassification
from lightllm.modules.contrastive import ContrastivePretraining, InfoNCE
from lightllm.modules.distillation import Distillation
from lightllm.modules.inner_losses import EmbeddingLoss, HiddenStateLoss, RelationLoss
from lightllm.modules.masked import MaskedPretraining
from lightllm.modules.on_policy import OnPolicy
from lightllm.modules.preference import PreferenceTuning
from lightllm.modules.prototypes import PrototypicalNetwork
from lightllm.modules.schedule import Schedule

__all__ = [
    "CausalPretraining",
    "ContrastivePretraining",
    "Distillation",
    "EmbeddingLoss",
    "FineTuning",
    "HiddenStateLoss",
    "InfoNCE",
    "LanguageModule",
    "Loss",
    "MaskedPretraining",
    "Masking",
    "OnPolicy",
    "PreferenceTuning",
    "PrototypicalNetwork",
    "RelationLoss",
    "Schedule",
    "SequenceClassification",
    "TeacherCache",
]
