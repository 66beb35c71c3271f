"""What happens during training: schedule, hook, log."""

from lightllm.callbacks.before_and_after import BeforeAndAfter
from lightllm.callbacks.checkpoint import Checkpoint
from lightllm.callbacks.compression_ledger import CompressionLedger
from lightllm.callbacks.export_best import ExportBest
from lightllm.callbacks.gradient_norm import GradientNorm
from lightllm.callbacks.gradual_unfreezing import GradualUnfreezing
from lightllm.callbacks.interruption import Interrupted, Interruption
from lightllm.callbacks.keep_tokenizer import KeepTokenizer
from lightllm.callbacks.loss_spike import LossSpike
from lightllm.callbacks.low_rank_decomposition import LowRankDecomposition
from lightllm.callbacks.magnitude_pruning import MagnitudePruning
from lightllm.callbacks.movement_pruning import MovementPruning
from lightllm.callbacks.network_size import NetworkSize
from lightllm.callbacks.non_finite_loss import NonFiniteLoss, NonFiniteLossError
from lightllm.callbacks.predictions import Predictions
from lightllm.callbacks.progress_bar import ProgressBar
from lightllm.callbacks.pruning import Pruning
from lightllm.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightllm.callbacks.random_state import RandomState
from lightllm.callbacks.rewind_metrics import RewindMetrics
from lightllm.callbacks.samples import SampleGenerations
from lightllm.callbacks.shared_run_folder import SharedRunFolder
from lightllm.callbacks.sparse_gpt_pruning import SparseGPTPruning
from lightllm.callbacks.sparsity_regularization import SparsityRegularization
from lightllm.callbacks.structured_pruning import StructuredPruning
from lightllm.callbacks.throughput import Throughput
from lightllm.callbacks.transforming import Transforming
from lightllm.callbacks.wanda_pruning import WandaPruning

__all__ = [
    "BeforeAndAfter",
    "Checkpoint",
    "CompressionLedger",
    "ExportBest",
    "GradientNorm",
    "GradualUnfreezing",
    "Interrupted",
    "Interruption",
    "KeepTokenizer",
    "LossSpike",
    "LowRankDecomposition",
    "MagnitudePruning",
    "MovementPruning",
    "NetworkSize",
    "NonFiniteLoss",
    "NonFiniteLossError",
    "Predictions",
    "ProgressBar",
    "Pruning",
    "QuantizationAwareTraining",
    "RandomState",
    "RewindMetrics",
    "SampleGenerations",
    "SharedRunFolder",
    "SparseGPTPruning",
    "SparsityRegularization",
    "StructuredPruning",
    "Throughput",
    "Transforming",
    "WandaPruning",
]
