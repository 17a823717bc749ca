"""Likelihoods, divergences and the contrastive loss, as pure functions."""

import math

import torch as th
from torch.nn import functional as F


def normal_kl(
    mean1: th.Tensor | float,
    logvar1: th.Tensor | float,
    mean2: th.Tensor | float,
    logvar2: th.Tensor | float,
) -> th.Tensor:
    """KL divergence of two diagonal Gaussians, element by element.

    Args:
        mean1: of the first. All four are broadcast against each other; at least one is a tensor.
        logvar1: log variance of the first.
        mean2: of the second.
        logvar2: log variance of the second.

    Returns:
        KL(first || second) in nats, of the broadcast shape.
    """
    given = (mean1, logvar1, mean2, logvar2)
    like = next(value for value in given if isinstance(value, th.Tensor))
    mean1, logvar1, mean2, logvar2 = (
        value if isinstance(value, th.Tensor) else like.new_tensor(value) for value in given
    )
    distance = (mean1 - mean2) ** 2 * th.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + th.exp(logvar1 - logvar2) + distance)


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """The standard normal's cumulative distribution by Page's tanh approximation (1977)."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor
) -> th.Tensor:
    """Log likelihood of 8-bit images under a Gaussian integrated over each level's bin (DDPM eq. 13).

    Args:
        x: images whose uint8 levels were mapped onto [-1, 1].
        means: of x's shape.
        log_scales: log standard deviations, of x's shape.

    Returns:
        Nats, of x's shape. The outermost bins reach to infinity.

    Raises:
        ValueError: the shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(f"shapes differ: {x.shape}, {means.shape}, {log_scales.shape}")
    centered = x - means
    inverse_scale = th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inverse_scale * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inverse_scale * (centered - 1.0 / 255.0))
    tiny = 1e-12
    log_upper = cdf_upper.clamp(min=tiny).log()
    log_rest = (1.0 - cdf_lower).clamp(min=tiny).log()
    log_bin = (cdf_upper - cdf_lower).clamp(min=tiny).log()
    return th.where(x < -0.999, log_upper, th.where(x > 0.999, log_rest, log_bin))


def contrastive_loss(
    z: th.Tensor,
    e: th.Tensor,
    *,
    temperature: float = 1.0,
    normalize: bool = False,
) -> th.Tensor:
    """Symmetric InfoNCE between noise representations and timestep embeddings (TCCD stage 1; CLIP).

    logits = z e^T / temperature; half the cross entropy over rows plus half that over columns,
    entry i belonging to entry i.

    Args:
        z: float32 [B, D], noise representations.
        e: float32 [B, D], timestep embeddings.
        temperature: > 0.
        normalize: scale z and e to unit length first, so that logits are cosines. The published
            method takes plain dot products.

    Returns:
        Scalar, >= 0.
    """
    if normalize:
        z, e = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
    logits = z @ e.T / temperature
    target = th.arange(len(z), device=z.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
