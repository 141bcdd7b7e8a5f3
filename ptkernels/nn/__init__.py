"""Drop-in modules over the operators, with constructors, parameters and state_dict of their torch.nn originals."""

from ptkernels.nn.attention import MultiheadAttention, TransformerEncoderLayer

__all__ = ["MultiheadAttention", "TransformerEncoderLayer"]
