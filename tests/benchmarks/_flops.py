"""Arithmetic of a vision transformer, counted from its spec: for model-FLOPs utilisation and for costs on paper.

A multiply-add counts as two operations. What is counted is what the model needs, not what an engine spends: recomputation in activation
checkpointing, norms and noise are not model FLOPs (Chowdhery et al. 2022, PaLM, appendix B). Norms, activations and softmax are left out.
"""

from dataclasses import replace
from math import prod

from pathfed_common.encoder.spec import EncoderSpec


def forward_flops(spec: EncoderSpec, tokens: int) -> float:
    """Of one tile's pass through the blocks with that many tokens: every weight matrix once a token, and attention's two products."""
    matrices = spec.depth * sum(prod(shape) for shape in spec.block_shapes().values() if len(shape) == 2)
    return 2.0 * tokens * matrices + spec.depth * 4.0 * tokens**2 * spec.embed_dim


def embed_flops(spec: EncoderSpec, patches: int) -> float:
    """Of cutting and projecting that many patches."""
    return 2.0 * patches * 3 * spec.patch_size**2 * spec.embed_dim


def mae_step_flops(spec: EncoderSpec, *, mask_ratio: float, decoder_dim: int, decoder_depth: int) -> float:
    """Of forward and backward (twice the forward) of one tile under masked autoencoding."""
    visible = spec.patches - int(spec.patches * mask_ratio) + spec.prefix_tokens
    head = replace(spec, embed_dim=decoder_dim, depth=decoder_depth, num_heads=1, mlp="gelu", mlp_ratio=4.0, reg_tokens=0)
    return 3.0 * (embed_flops(spec, spec.patches) + forward_flops(spec, visible) + forward_flops(head, spec.patches + 1))


def distillation_step_flops(spec: EncoderSpec, *, local_crops: int, local_px: int, head_flops: float = 0.0) -> float:
    """Of one tile under self-distillation: two global crops at the encoder's size and `local_crops` of `local_px`, student and teacher.

    The student goes forward and backward through all crops, the teacher forward through the global ones.
    """
    local = (local_px // spec.patch_size) ** 2
    globals_ = 2 * (embed_flops(spec, spec.patches) + forward_flops(spec, spec.patches + spec.prefix_tokens))
    locals_ = local_crops * (embed_flops(spec, local) + forward_flops(spec, local + spec.prefix_tokens))
    return 3.0 * (globals_ + locals_) + globals_ + head_flops
