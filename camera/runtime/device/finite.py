"""Whether tensors are free of NaN and inf; of many tensors on a device, looked at once."""

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and inf, in one read and without a copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


class FiniteCheck:
    """Least and largest number of many tensors: a read and a launch for each, a wait for all.

    What is asked for the first one that isn't finite decides of nothing: it may be asked late.
    """

    def __init__(self) -> None:
        self._names: dict[torch.dtype, list[str]] = {}
        self._bounds: dict[torch.dtype, list[torch.Tensor]] = {}
        self._order: list[str] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Enter a tensor; its memory may be freed at once."""
        if tensor.is_floating_point() and tensor.numel():
            self._order.append(name)
            self._names.setdefault(tensor.dtype, []).append(name)
            self._bounds.setdefault(tensor.dtype, []).extend(tensor.aminmax())

    def first_broken(self, dtypes: dict[str, torch.dtype] | None = None) -> str | None:
        """The first tensor that holds NaN or inf; with `dtypes`, that would as that dtype."""
        broken: set[str] = set()
        for dtype, names in self._names.items():
            bounds_N2 = torch.stack(self._bounds[dtype]).view(-1, 2)
            for target in sorted({(dtypes or {}).get(name, dtype) for name in names}, key=str):
                finite_N = bounds_N2.to(target).isfinite().all(1).tolist()
                broken |= {
                    name
                    for name, finite in zip(names, finite_N, strict=True)
                    if not finite and (dtypes or {}).get(name, dtype) == target
                }
        return next((name for name in self._order if name in broken), None)
