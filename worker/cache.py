"""Keys and values of a layer for rows that go on: with room for what follows, so that a step copies only what is new."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

SPARE_COLUMNS = 32  # after so many steps everything is copied once


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Of rows padded on the left, [B, H, S, d], in storage with some free columns at the end.

    Args:
        keys_BHTd, values_BHTd: of another layer, for their form.
        width: columns at the beginning.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys_BHTd: Tensor, values_BHTd: Tensor, rows: int, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys_BHTd, values_BHTd)
        self._keys, self._values = (
            of.new_zeros(rows, of.shape[1], width + SPARE_COLUMNS, of.shape[3]) for of in (keys_BHTd, values_BHTd)
        )
        self._show(rows, width)

    @classmethod
    def joined(cls, parts: Sequence[Self], width: int) -> Self:
        """The rows of all. Of each the last columns are taken, so many as it has of `width`."""
        made = cls(parts[0].keys, parts[0].values, sum(len(part.keys) for part in parts), width)
        first = 0
        for part in parts:
            rows, own = slice(first, first + len(part.keys)), min(width, part.keys.shape[2])
            made.keys[rows, :, width - own :] = part.keys[:, :, part.keys.shape[2] - own :]
            made.values[rows, :, width - own :] = part.values[:, :, part.values.shape[2] - own :]
            first += len(part.keys)
        return made

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = self._keys[:rows, :, :width], self._values[:rows, :, :width]

    def fill(self, rows: Sequence[int], keys_BHTd: Tensor, values_BHTd: Tensor, at_RS: Tensor) -> None:
        """Set rows to these positions of another layer's, each counted over all of its rows (b T + t)."""
        self.keys[rows] = keys_BHTd.transpose(1, 2).flatten(0, 1)[at_RS].transpose(1, 2)
        self.values[rows] = values_BHTd.transpose(1, 2).flatten(0, 1)[at_RS].transpose(1, 2)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, _heads, start, _size = self.keys.shape
        end = start + key_states.shape[2]
        if end > self._keys.shape[2]:
            more = (0, 0, 0, end - start + SPARE_COLUMNS)  # of the rows that go on alone
            self._keys = pad(self.keys, more)
            self._values = pad(self.values, more)
        self._keys[:rows, :, start:end], self._values[:rows, :, start:end] = key_states, value_states
        self._show(rows, end)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """As the library has it: less than 0."""
        self._show(self.keys.shape[0], self.keys.shape[2] + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was, in place: that is i itself, or not among the rows that stay where they are."""
        moved = (indices.cpu() != torch.arange(len(indices))).nonzero()[:, 0].to(indices.device)
        self.keys[moved], self.values[moved] = self.keys[indices[moved]], self.values[indices[moved]]
        self._show(len(indices), self.keys.shape[2])
