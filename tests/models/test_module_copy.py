import torch
from torch import nn

from lightllm.models.module_copy import copy_without_hooks


class Uncopyable:
    """What a hook may belong to."""

    def __init__(self) -> None:
        self.calls = 0

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("copied")

    def hook(self, *_: object) -> None:
        self.calls += 1


def test_a_copy_has_its_own_weights_and_no_hooks() -> None:
    owner, layer = Uncopyable(), nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    layer[0].register_forward_hook(owner.hook)
    layer[0].register_forward_pre_hook(owner.hook)
    layer[0].register_full_backward_hook(owner.hook)
    layer.register_forward_hook(owner.hook, with_kwargs=True)
    copied = copy_without_hooks(layer.eval())
    inputs = torch.ones(1, 2)
    assert torch.equal(copied(inputs), copied(inputs))
    assert owner.calls == 0
    assert torch.equal(copied(inputs), layer(inputs))
    assert owner.calls == 3
    with torch.no_grad():
        copied[0].weight.zero_()
    assert layer[0].weight.any()
    assert not copied.training
