"""The layer as TorchScript writes it down: sizes are read from the input of each call."""

import torch
from torch import Tensor


@torch.jit.script_if_tracing
def padded_layer(
    input: Tensor,
    sizes: Tensor | None,
    state: list[Tensor],
    params: list[Tensor],
    layout: str,
    mode: str,
    bidirectional: bool,
    all_cells: bool = False,
    eps: float = 1e-5,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer over padded sequences: output, h_n and c_n."""
    batch_size = input.size(0 if layout == "batch_first" else 1)
    output, h_n, c_n, _, _ = torch.ops.ptkernels.packed_rnn(
        input,
        sizes,
        None,
        state,
        params,
        batch_size,
        layout,
        mode,
        bidirectional,
        False,
        False,
        all_cells,
        eps,
        zoneout,
        zoneout_cell,
        seed,
    )
    return output, h_n, c_n
