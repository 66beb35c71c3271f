"""What the verb quantize can be asked for. Nothing heavy is imported here: help is to be quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """Quantize a run or an export after training, and write it; read back and compared.

    Args:
        model: A run folder, or anything else that holds a model.
        scheme: int4_weight_only, int8_weight_only: weights alone; int8_dynamic_int4, int8_dynamic_int8: activations are
            rounded to 8 bits too, token by token.
        method: `round` to nearest; `gptq`: later weights make up for the rounding of earlier ones, on calibration data.
        format: `torchao`: a Hugging Face folder of torchao's tensors; `gguf`: a file for llama.cpp, Q4_0 or Q8_0;
            `merged`: an ordinary folder with the rounded weights.
        to: Where to; RUN/SCHEME-METHOD by default.
        group_size: How many weights share a scale. None: 32 with 4 bits and for gguf, the whole row with 8.
        leave_out: Regular expressions of names of layers that are not quantized: '["down_proj"]'.
        data: What gptq calibrates on: a file of chats or text; a run's own training data by default.
        documents: How many documents it calibrates on.
        checkpoint: Of a run: best, newest or a file.
    """

    model: str
    scheme: Literal["int8_dynamic_int4", "int4_weight_only", "int8_weight_only", "int8_dynamic_int8"] = (
        "int4_weight_only"
    )
    method: Literal["round", "gptq"] = "round"
    format: Literal["torchao", "gguf", "merged"] = "torchao"
    to: str | None = None
    group_size: int | None = None
    leave_out: tuple[str, ...] = ()
    data: str | None = None
    documents: int = 128
    checkpoint: str = "best"
