"""Arrays that may be torch tensors: told apart without importing torch, and brought to NumPy."""

from __future__ import annotations

import sys
from typing import Any


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor; torch is not imported to find out.

    >>> is_tensor([[1.0]])
    False
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def on_host(x: Any) -> Any:
    """A tensor as a NumPy array, whatever its device and graph; anything else as it is.

    Types that NumPy lacks (bfloat16) become float64.

    >>> on_host([1.0, 2.0])
    [1.0, 2.0]
    """
    if not is_tensor(x):
        return x
    lacking = x.is_floating_point() and x.dtype == sys.modules["torch"].bfloat16
    return (x.detach().double() if lacking else x.detach()).cpu().numpy()
