"""Spreading a network and its batches over processes: which rank holds what, and what is exchanged."""

from lightllm.parallel.degrees import Degrees
from lightllm.parallel.pipeline import PipelineParallelStrategy
from lightllm.parallel.sharding import Sharding
from lightllm.parallel.strategy import ParallelStrategy

__all__ = ["Degrees", "ParallelStrategy", "PipelineParallelStrategy", "Sharding"]
