"""Losses of single predictions, in float32 and unreduced: the caller sums and weighs them."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of class labels, in nats.

    Args:
      logits: [..., K], any float type.
      labels: integers [...] in 0..K-1.
      smoothing: share of the target spread evenly over all K classes, the right one included
        (as in timm and `torch.nn.CrossEntropyLoss`).

    Returns:
      float32 [...].
    """
    logits = logits.astype(jnp.float32)
    # Not through log_softmax, which would store log-probabilities of all K classes beside them.
    total = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if not smoothing:
        return total - right
    return total - (1.0 - smoothing) * right - smoothing * jnp.mean(logits, axis=-1)


def logit_laplace(stats: jax.Array, mapped: jax.Array) -> jax.Array:
    """Negative log-likelihood of pixels under the logit-Laplace distribution, in nats.

    The density on (0, 1) of a Laplace variable passed through the sigmoid (DALL-E, arXiv
    2102.12092, equation 2): f(x) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)). It is a density, of
    mapped pixels: on flat surfaces its logarithm has no upper bound, so the loss may fall below 0.

    Args:
      stats: [..., 2 * channels], the decoder's output: first the means mu, then ln b.
      mapped: [..., channels], pixels mapped into (0, 1), which DALL-E does by 0.8 x + 0.1.

    Returns:
      float32 [..., channels], one value for each pixel value.
    """
    mean, log_scale = jnp.split(stats.astype(jnp.float32), 2, axis=-1)
    mapped = mapped.astype(jnp.float32)
    log_x, log_rest = jnp.log(mapped), jnp.log1p(-mapped)
    distance = jnp.abs(log_x - log_rest - mean) * jnp.exp(-log_scale)
    return distance + jnp.log(2.0) + log_scale + log_x + log_rest


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL divergence of softmax(logits) from the uniform distribution over K codes, in nats.

    Args:
      logits: [..., K], any float type.

    Returns:
      float32 [...], from 0 (uniform) to log K (one code only).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return jnp.log(float(logits.shape[-1])) - entropy
