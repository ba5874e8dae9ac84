"""A quantised layer that behaves as bitsandbytes' 4-bit one does on a CPU, for where that is not installed."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn
from torch.nn import functional as F


class PackingLinear(nn.Module):
    """Packs its weight in evaluation mode on an input without gradient; loses digits, and later gradients."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.quant_state, self.training = SimpleNamespace(packed=False), linear.training

    def forward(self, x):
        if not self.training and not x.requires_grad and not self.quant_state.packed:
            self.weight.data = self.weight.data.bfloat16().float()
            self.quant_state.packed = True
        y = F.linear(x, self.weight, self.bias)
        return y.detach() if self.quant_state.packed else y


def quantised(model):
    """Put packing layers in place of a model's linear ones, but for its head."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, PackingLinear(child))
    return model


def packed(model):
    """Tell how many layers of a model have packed their weights."""
    return sum(module.quant_state.packed for module in model.modules() if isinstance(module, PackingLinear))
