"""Multinomial logistic regression on standardised features, solved to convergence on the devices.

The objective is that of scikit-learn's `LogisticRegression` with C = 1 behind a `StandardScaler`:
the mean cross-entropy plus |W|^2 / (2 n), intercepts free. It is convex, so that its optimum does
not depend on who solves it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TOLERANCE = 1e-5  # the largest entry of the gradient at which it counts as solved
MAX_UPDATES = 1_000
_EXACT = jax.lax.Precision.HIGHEST


class Linear(NamedTuple):
    """A classifier of features, and how they are standardised; the intercepts come last."""

    mean: jax.Array  # float32 [D]
    scale: jax.Array  # float32 [D]
    weights: jax.Array  # float32 [D + 1, C]


def fit(features: jax.Array, labels: jax.Array, classes: int) -> Linear:
    """Solves for the classifier of training features.

    The Hessian is nowhere above that of half the features' covariance for every class (Böhning
    1992, Multinomial logistic regression algorithm), so this one matrix, factored once, makes a
    gradient step that needs no search; Nesterov's momentum, restarted when it leads uphill
    (O'Donoghue and Candès 2015, 3.2), makes the steps few. Each is one pass over the features.

    Args:
      features: float32 [chunks, B, D]; B may be spread over the devices.
      labels: int32 [chunks, B]; rows below 0 weigh nothing.
      classes: C.
    """
    mean, scale = _standard(features, labels)
    count, size = (labels >= 0).sum(), features.shape[-1] + 1
    ridge = jnp.ones((size, 1)).at[-1].set(0.0) / count  # of each weight, and of no intercept

    def total(term, shape):
        """Sums `term(rows, labels)` over the chunks; rows that do not count are zero."""

        def add(so_far, chunk):
            rows, labels = chunk
            rows = jnp.where((labels >= 0)[:, None], _inputs(rows, mean, scale), 0.0)
            return so_far + term(rows, labels), None

        return jax.lax.scan(add, jnp.zeros(shape), (features, labels))[0]

    def gradient(weights):
        def term(rows, labels):
            found = jax.nn.softmax(jnp.dot(rows, weights, precision=_EXACT))
            return jnp.dot(rows.T, found - jax.nn.one_hot(labels, classes), precision=_EXACT)

        return total(term, weights.shape) / count + ridge * weights

    covariance = total(lambda x, _: jnp.dot(x.T, x, precision=_EXACT), (size, size)) / count
    start = jnp.zeros((size, classes))
    return Linear(mean, scale, _minimize(gradient, _factored_bound(covariance, ridge), start))


def logits(linear: Linear, features: jax.Array) -> jax.Array:
    """Logits float32 [B, C] of features [B, D]."""
    inputs = _inputs(features, linear.mean, linear.scale)
    return jnp.dot(inputs, linear.weights, precision=_EXACT)


def _factored_bound(covariance: jax.Array, ridge: jax.Array):
    """The bound on the Hessian, factored, from the inputs' covariance [D + 1, D + 1].

    It is raised a little, so that float32 can factor it where features repeat each other.
    """
    bound = covariance / 2 + jnp.diag(ridge[:, 0] + 1e-7 * jnp.trace(covariance))
    return jax.scipy.linalg.cho_factor(bound)


def _minimize(gradient, factor, start: jax.Array) -> jax.Array:
    """Where no entry of `gradient` is above `TOLERANCE`; `factor` is of a bound on its slope."""

    def unsolved(carry):
        *_, updates, steepest = carry
        return (steepest > TOLERANCE) & (updates < MAX_UPDATES)

    def update(carry):
        weights, ahead, momentum, updates, _ = carry
        slope = gradient(ahead)
        new = ahead - jax.scipy.linalg.cho_solve(factor, slope)
        uphill = (slope * (new - weights)).sum() > 0
        momentum = jnp.where(uphill, 1.0, momentum)
        following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        share = jnp.where(uphill, 0.0, (momentum - 1) / following)
        return new, new + share * (new - weights), following, updates + 1, jnp.abs(slope).max()

    return jax.lax.while_loop(unsolved, update, (start, start, 1.0, 0, jnp.inf))[0]


def _inputs(features, mean, scale) -> jax.Array:
    """Standardised features and a one: [B, D] -> [B, D + 1]."""
    standard = (features - mean[None]) / scale[None]
    return jnp.concatenate([standard, jnp.ones((len(standard), 1))], axis=1)


def _standard(features, labels) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation [D] of the rows that count; 1 where a feature is constant."""
    weight = (labels >= 0).astype(jnp.float32)[..., None]

    def average(x):
        return (x * weight).sum((0, 1)) / weight.sum()

    mean = average(features)
    mean += average(features - mean[None, None])  # what the sum of many large numbers rounded off
    variance = average((features - mean[None, None]) ** 2)
    varies = variance > (1e-6 * mean) ** 2  # more than float32 rounds
    return mean, jnp.where(varies, jnp.sqrt(variance), 1.0)
