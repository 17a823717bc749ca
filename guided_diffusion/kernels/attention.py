"""Self-attention by torch's fused kernels."""

from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def attention(qkv: th.Tensor) -> th.Tensor:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32.

    Args:
        qkv: [B, 3, heads, N, D], any strides.

    Returns:
        [B, heads, N, D].
    """
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()  # without which no fused kernel is taken
    slow = qkv.device.type == "cpu" and qkv.dtype in (th.bfloat16, th.float16)
    if slow and qkv.requires_grad and not th.compiler.is_compiling():
        return _Attention.apply(qkv)
    q, k, v = qkv.unbind(1)
    return F.scaled_dot_product_attention(q, k, v)


class _Attention(th.autograd.Function):
    """`attention` on the CPU in 16 bits, whose backward kernel takes 2 to 15 times as long as float32's."""

    @staticmethod
    def forward(ctx: Any, qkv: th.Tensor) -> th.Tensor:
        out, logsumexp = th.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv.unbind(1))
        ctx.save_for_backward(qkv, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> th.Tensor:
        qkv, out, logsumexp = ctx.saved_tensors
        parts = th.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradients[0].float(), *qkv.float().unbind(1), out.float(), logsumexp, 0.0, False
        )
        gradient = th.empty_like(qkv)
        for whole, part in zip(gradient.unbind(1), parts, strict=True):
            whole.copy_(part)
        return gradient
