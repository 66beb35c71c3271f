"""Learning from one's own answers: a student's generations, which its teacher then scores (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, Document, TextBatch, batch_to, pack_documents
from lightllm.generate import Decoding, generate_ids
from lightllm.generate.batches import check_generates
from lightllm.models.anatomy import max_positions


@dataclass(frozen=True)
class OnPolicy:
    """Let the student answer some batches' prompts itself, and learn how its teacher would have gone on.

    Args:
        share: Of the training batches, at random.
        temperature: By which the student's logits are divided for sampling; 0 takes the likeliest token.
        max_new_tokens: Of an answer at most.

    Raises:
        ValueError: A number is out of its range.
    """

    share: float = 0.5
    temperature: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"on_policy.share is {self.share}: give more than 0 and at most 1, or on_policy: null")
        self.decoding(seed=0)

    def decoding(self, seed: int) -> Decoding:
        """How tokens are chosen."""
        return Decoding(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed)


def check_answers(network: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a student that can give no answers.

    Raises:
        ValueError: It is no transformers network, or nothing says which tokens end an answer.
    """
    check_generates(network)
    if tokenizer is None:
        raise ValueError("on_policy needs a tokenizer, which says where an answer ends: set data.tokenizer")


class BatchPrompt(NamedTuple):
    """What a document of a batch begins with, up to the first token that is to be learned."""

    row: int
    document: int
    tokens: list[int]


def batch_prompts(batch: TextBatch) -> list[BatchPrompt]:
    """The prompts of a batch's documents: of a chat what is before its first answer, of plain text its first token."""
    prompts = []
    columns = (batch["input_ids"], batch["labels"], batch["position_ids"], batch["document_ids"])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for row, (tokens, labels, positions, documents) in enumerate(rows):
        begins = [index for index, position in enumerate(positions) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            targets = [index for index in range(begin, end) if labels[index] != IGNORE_INDEX]
            if targets and documents[begin] != PADDING_DOCUMENT:
                prompts.append(BatchPrompt(row, documents[begin], tokens[begin : targets[0] + 1]))
    return prompts


def own_answers(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: TextBatch, settings: OnPolicy
) -> TextBatch | None:
    """A batch of the network's own answers to the prompts of another, of which the answers are the targets.

    What is drawn depends on torch's random numbers of the CPU, of which one is taken.

    Args:
        network: The student; it comes back in the mode that it was in.
        tokenizer: Says which tokens end an answer.
        batch: What has the prompts; its rows keep their documents.
        settings: How to answer.

    Returns:
        The batch, on the same device; None where no prompt leaves room for an answer among the network's positions.
    """
    seed = int(torch.randint(2**31, ()))
    positions = max_positions(network)
    prompts = [one for one in batch_prompts(batch) if positions is None or len(one.tokens) < positions]
    if not prompts:
        return None
    asked = [prompt.tokens for prompt in prompts]
    answers = generate_ids(network, tokenizer, asked, settings.decoding(seed), batch_size=len(asked))
    rows: dict[int, list[Document]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        targets = [False] * len(prompt.tokens) + [True] * len(answer)
        rows.setdefault(prompt.row, []).append(Document([*prompt.tokens, *answer], targets, prompt.document))
    padding = tokenizer.pad_token_id
    made = pack_documents(list(rows.values()), padding_token=padding if isinstance(padding, int) else 0)
    return batch_to(made, batch["input_ids"].device)
