from __future__ import annotations

import torch

from lightllm.modules.scale_in_place import scale_in_place


def test_every_dtype_is_scaled_by_the_same_number() -> None:
    tensors = [torch.arange(6, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)]
    expected = [(tensor.double() * 1.5).to(tensor.dtype) for tensor in tensors]
    scale_in_place([*tensors, torch.ones(2, device="meta")], torch.tensor(1.5, dtype=torch.float64))
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(tensors, expected, strict=True))
    scale_in_place([], torch.tensor(1.5))
