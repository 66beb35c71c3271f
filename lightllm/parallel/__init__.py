"""Spreading a network and its batches over processes: which rank holds what, and what is exchanged."""

from lightllm.parallel.degrees import Degrees

__all__ = ["Degrees"]
