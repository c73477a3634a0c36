"""The vision tower's first layer as a matrix product.

Decisions:
- A convolution whose kernel is as large as each of its inputs is one matrix product, several times faster.
- Weights keep the convolution's names and shapes, so checkpoints load and save as before.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Conv3d):
    """A convolution over patches that are each as large as its kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, T, P, P] to [N, H, 1, 1, 1]."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def as_product(given: nn.Conv3d) -> PatchProjection:
    """``given`` with the same weights, as a product; draws no random numbers."""
    projection = nn.utils.skip_init(
        PatchProjection, given.in_channels, given.out_channels, given.kernel_size, stride=given.stride,
        bias=given.bias is not None, device=given.weight.device, dtype=given.weight.dtype,
    )  # fmt: skip
    projection.load_state_dict(given.state_dict(), assign=True)
    return projection
