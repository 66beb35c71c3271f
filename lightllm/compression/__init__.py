"""Compression: what becomes of weights; pure mathematics on tensors and layers, that knows no trainer."""
