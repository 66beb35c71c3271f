"""A teacher that is there itself: how it is built, and whether it reads what the student reads."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from lightllm.models.adapters import Full, QLoRA
from lightllm.models.anatomy import max_positions
from lightllm.models.hidden_states import check_packing
from lightllm.models.load import load_tokenizer
from lightllm.models.network import BuildRequest, Network
from lightllm.modules.build import BuildPlan, build_network, on_meta
from lightllm.modules.other_tokenizer import OtherTokenizer


def build_teacher(
    network: Network,
    tokenizer: PreTrainedTokenizerBase | None,
    bits: Literal[4, 8] | None = None,
    packed: bool = False,
    compile: bool = False,
    other_tokens: bool = False,
) -> nn.Module:
    """Build a frozen causal network that teaches.

    Args:
        network: Where it comes from.
        tokenizer: The data's.
        bits: Store its matrices in 4 bits (NF4) or 8 by bitsandbytes; None keeps its dtype.
        packed: Whether rows hold several documents.
        compile: `torch.compile` each block.
        other_tokens: Whether its tokens may be others than the data's.

    Raises:
        ValueError: It does not keep packed documents apart, or gives its tokens other numbers.
    """
    plan = BuildPlan(network, Full(), "causal", gradient_checkpointing=False, compile=compile)
    teacher = build_network(plan, BuildRequest("causal", tokenizer, _quantization(bits))).requires_grad_(False)
    if packed and not on_meta(teacher):
        check_packing(teacher)
    source = network.tokenizer_source
    if tokenizer is not None and source is not None and not other_tokens:
        check_tokenizers(tokenizer, load_tokenizer(source))
    return teacher


def _quantization(bits: Literal[4, 8] | None) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else QLoRA().quantization


def check_tokenizers(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give a number to different tokens; one may have more tokens than the other.

    Raises:
        ValueError: They do: no divergence would compare the same tokens.
    """
    token = _first_other_token(ours, theirs)
    if token is not None:
        names = (tokenizer.convert_ids_to_tokens(token) for tokenizer in (ours, theirs))
        raise ValueError(
            "token {} is {!r} in the data's tokenizer and {!r} in the teacher's, so their predictions cannot be "
            "compared token by token: set divergence.kind to universal, leave data.tokenizer out with a student from "
            "scratch (FromConfig) or of the teacher's layers (EveryNthLayer), take a teacher with the student's "
            "tokenizer, or train on the teacher's answers as text (FineTuning)".format(token, *names)
        )


def translator(ours: PreTrainedTokenizerBase | None, source: str | None, teacher: nn.Module) -> OtherTokenizer | None:
    """What turns the data's batches into the teacher's tokens; None where these are the same.

    Args:
        ours: The data's tokenizer.
        source: Where the teacher's is loaded from.
        teacher: The teacher, built.

    Raises:
        ValueError: One of the tokenizers is not known.
    """
    if ours is None or source is None:
        raise ValueError(
            "divergence.kind universal reads text in two tokenizers, and there is none of "
            f"{'the data' if ours is None else 'the teacher'}: name it (data.tokenizer, or a teacher that has one)"
        )
    theirs = load_tokenizer(source)
    if _first_other_token(ours, theirs) is None:
        return None
    return OtherTokenizer(ours, theirs, max_positions(teacher))


def _first_other_token(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> int | None:
    """The first number that both give, to different tokens."""
    tokens = {index: token for token, index in theirs.get_vocab().items()}
    numbers = sorted(ours.get_vocab().items(), key=lambda item: item[1])
    return next((index for token, index in numbers if tokens.get(index, token) != token), None)
