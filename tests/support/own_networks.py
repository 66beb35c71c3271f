"""Modules of a user's own, as `FromModule` takes them: hidden states out, and a head by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gru(nn.Module):
    """Two recurrent layers, which ignore positions; a table of positions stands before that of tokens all the same."""

    def __init__(self, vocab: int, width: int = 8) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, width)
        self.tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList([nn.GRU(width, width, batch_first=True) for _ in range(2)])
        self.out = nn.Linear(width, vocab)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return hidden


class Transformer(nn.Module):
    """One layer of attention that keeps documents apart by their positions, which begin at 0."""

    def __init__(self, vocab: int, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        document = (position_ids == 0).cumsum(1)
        length = input_ids.shape[1]
        seen = (document[:, :, None] == document[:, None]) & torch.ones(length, length).tril().bool()
        for layer in self.layers:
            hidden = layer(hidden, src_mask=~seen.repeat_interleave(2, 0))
        return hidden
