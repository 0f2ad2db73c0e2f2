"""Modes of torch that hold while something is computed; those that hold already cost nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

__all__ = ["in_full_precision", "outside_inference", "outside_transforms"]


def in_full_precision(device: str) -> AbstractContextManager[object]:
    """Without autocast.

    Args:
        device: the type of the device.
    """
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def outside_inference(recording: bool) -> AbstractContextManager[object]:
    """Where tensors are made that training may use later: not those of inference mode.

    Args:
        recording: whether autograd records.
    """
    if not torch.is_inference_mode_enabled():
        same = torch.is_grad_enabled() == recording
        return nullcontext() if same else torch.set_grad_enabled(recording)
    modes = ExitStack()
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.set_grad_enabled(recording))
    return modes


def outside_transforms() -> AbstractContextManager[object]:
    """Where codes of levels are what they are: no ``torch.func`` transform moves them, and what is
    made of them within one could not be looked at."""
    functorch: AbstractContextManager[object] = torch._C._DisableFuncTorch()
    return functorch
