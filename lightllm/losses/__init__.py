"""Losses: pure functions of tensors that know neither network nor trainer."""

from lightllm.losses.contrastive import info_nce, matryoshka_info_nce
from lightllm.losses.cross_entropy import linear_cross_entropy
from lightllm.losses.divergence import Divergence, LogitTerms, linear_divergence
from lightllm.losses.features import attention_relations, hidden_cosine, hidden_mse
from lightllm.losses.log_probabilities import linear_log_probabilities
from lightllm.losses.preference import dpo_loss, implicit_rewards, ipo_loss
from lightllm.losses.prototypes import Distance, class_means, prototype_scores, scores_without_own
from lightllm.losses.token_statistics import TokenStatistics, linear_token_statistics
from lightllm.losses.top_token_divergence import linear_top_token_divergence
from lightllm.losses.top_tokens import TopTokens, linear_top_tokens

__all__ = [
    "Distance",
    "Divergence",
    "LogitTerms",
    "TokenStatistics",
    "TopTokens",
    "attention_relations",
    "class_means",
    "dpo_loss",
    "hidden_cosine",
    "hidden_mse",
    "implicit_rewards",
    "info_nce",
    "ipo_loss",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probabilities",
    "linear_token_statistics",
    "linear_top_token_divergence",
    "linear_top_tokens",
    "matryoshka_info_nce",
    "prototype_scores",
    "scores_without_own",
]
