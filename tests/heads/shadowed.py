"""A model whose modules have lost their names."""

from __future__ import annotations

from typing import Any

from torch import nn


class Shadowed(nn.Module):
    """The same model, whose modules with weights of their own are called m0, m1, ...

    Attributes:
        names: The name that each of them had.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "hidden", model)
        self.names: dict[str, str] = {}
        covered: set[str] = set()
        for name, module in model.named_modules():
            has_own = bool(module._parameters) or not list(module.children())
            if not has_own or not name or any(name.startswith(f"{other}.") for other in covered):
                continue
            shadow = f"m{len(self.names)}"
            self.names[shadow] = name
            # Whoever holds parameters beside modules keeps these: their names end the same.
            covered.add(name)
            self.add_module(shadow, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden(*args, **kwargs)

    def named(self, path: str) -> str:
        """The name that a module or parameter had."""
        shadow, dot, rest = path.partition(".")
        return f"{self.names[shadow]}{dot}{rest}"
