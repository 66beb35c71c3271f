"""Objectives: what a network is trained towards, one a file."""

from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.build import Transformation, TransformationKind
from lightllm.modules.causal import CausalPretraining, FineTuning
from lightllm.modules.preference import PreferenceTuning
from lightllm.modules.schedule import Schedule

__all__ = [
    "CausalPretraining",
    "FineTuning",
    "LanguageModule",
    "Loss",
    "PreferenceTuning",
    "Schedule",
    "Transformation",
    "TransformationKind",
]
