"""AdamW as the BEiT code runs it, as one optax chain.

The chain is: clip the global gradient norm, Adam, decoupled weight decay, layer-wise factors, and
the learning rate of the schedule. All of its state is plain optax state shaped like the parameters,
so it is sharded as they are. The order matters: the layer-wise factor multiplies the whole update,
weight decay included, as parameter groups with their own learning rate do in PyTorch.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beit_jax.errors import UserError

PyTree = Any

_INPUT_NAMES = ("cls_token", "mask_token", "pos_embed", "patch_embed")
_UNDECAYED_NAMES = ("pos_embed", "cls_token")


def scaled_learning_rate(learning_rate: float, *, reference_batch: int, batch_size: int) -> float:
    """The peak learning rate for a global batch of `batch_size` images.

    With `reference_batch` 0 the rate is absolute, as in most BEiT recipes; otherwise it is quoted
    for `reference_batch` images and grows linearly with the batch (VQ-KD: run_vqkd_training.py).
    """
    if reference_batch < 0:
        raise UserError(
            f"config.optimizer.reference_batch is {reference_batch}: set a number of images, "
            "or 0 for a learning rate that does not depend on the batch."
        )
    if reference_batch == 0:
        return learning_rate
    return learning_rate * batch_size / reference_batch


def make_schedule(
    name: str, peak: float, final: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """The learning rate of an update, counted from 0.

    Args:
      name: cosine (`warmup_cosine`) or linear (`warmup_linear`).
      peak, final: rates.
      warmup_steps, total_steps: updates.

    Raises:
      UserError: another name, no updates at all, a warm-up longer than the training, or a negative
        number.
    """
    schedules = {"cosine": warmup_cosine, "linear": warmup_linear}
    if name not in schedules:
        raise UserError(
            f"config.optimizer.schedule={name!r} is unknown; choose one of {', '.join(schedules)}."
        )
    if total_steps < 1:
        raise UserError(
            f"Training would take {total_steps} updates: raise config.train.steps or "
            "config.train.epochs to at least one update."
        )
    _refuse_negative("learning_rate", peak)
    _refuse_negative("final_learning_rate", final)
    _refuse_negative("warmup_steps", warmup_steps)
    if warmup_steps > total_steps:
        raise UserError(
            f"The warm-up takes {warmup_steps} updates but the training only {total_steps}: lower "
            "config.optimizer.warmup_steps or config.optimizer.warmup_epochs, or train longer."
        )
    return schedules[name](peak, final, warmup_steps, total_steps)


def warmup_linear(peak: float, final: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate of update `step`, counted from 0: mmcv's poly policy of power 1.

    It falls linearly from `peak` at update 0 to `final` at `total_steps`; the first `warmup_steps`
    updates take the share `step / warmup_steps` of that.
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = 1.0 - jnp.minimum(step / total_steps, 1.0)
        ramp = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0
        return (final + (peak - final) * left) * ramp

    return schedule


def warmup_cosine(peak: float, final: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate of update `step`, counted from 0; official: `cosine_scheduler` in utils.py.

    The first `warmup_steps` updates take `linspace(0, peak, warmup_steps)`, both ends included, so
    that the very first update changes nothing; the others follow half a cosine from `peak` towards
    `final`, which is reached at `total_steps` and kept from there on.
    """
    ramp_steps = max(warmup_steps - 1, 1)
    cosine_steps = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / cosine_steps, 0.0, 1.0)
        cosine = final + 0.5 * (peak - final) * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, peak * step / ramp_steps, cosine)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies; official: `get_parameter_groups` in optim_factory.py.

    Spared are biases, everything with at most one axis (norms, LayerScale), `pos_embed` and
    `cls_token`. The mask token and the relative position tables *are* decayed, as in the official
    runs. `params` is a tree of anything that has `ndim`, shapes without values included.
    """

    def decayed(path: tuple, leaf: Any) -> bool:
        name = _names(path)[-1]
        return leaf.ndim > 1 and not name.endswith("bias") and name not in _UNDECAYED_NAMES

    return jax.tree_util.tree_map_with_path(decayed, params)


def layer_scales(params: PyTree, depth: int, decay: float) -> PyTree:
    """The factor on each parameter's update: `decay ** (depth + 1 - layer)`.

    Layer 0 is what makes the first block's input (tokens, positions, patch embedding), layer i + 1
    is `block_<i>`, and layer `depth + 1` is all else: norms, heads, a shared relative position
    table. Official: `get_num_layer_for_vit` in optim_factory.py.
    """

    def scale(path: tuple, _: Any) -> float:
        return decay ** (depth + 1 - _layer(_names(path), depth))

    return jax.tree_util.tree_map_with_path(scale, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips as `torch.nn.utils.clip_grad_norm_`: factor `max_norm / (norm + 1e-6)`, at most 1.

    optax's own transformation has no 1e-6, which shows after a few clipped steps.
    """

    def clip(updates: PyTree, _: PyTree | None) -> PyTree:
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + 1e-6), 1.0)
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(clip)


def make_optimizer(
    params: PyTree,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    layer_decay: float,
    depth: int,
) -> optax.GradientTransformation:
    """AdamW over `params` (arrays or `ShapeDtypeStruct`s; only names and ranks are read).

    Args:
      params: the tree that the optimizer will be given.
      schedule: learning rate of an update, counted from 0.
      b1, b2, eps: Adam's moments and its denominator's addend, as PyTorch defines them.
      weight_decay: decoupled, times the learning rate, on the parameters of `decay_mask`.
      clip: largest global gradient norm; 0 switches clipping off.
      layer_decay: factor per block away from the head, see `layer_scales`; 1 treats all alike.
      depth: number of blocks; read only where `layer_decay` is not 1.

    Raises:
      UserError: a value outside its range, with the key to change.
    """
    _check_adam(b1, b2, eps)
    _refuse_negative("weight_decay", weight_decay)
    _refuse_negative("clip", clip)
    if not 0.0 < layer_decay <= 1.0:
        raise UserError(
            f"config.optimizer.layer_decay is {layer_decay}: set a factor above 0 and at most 1, "
            "where 1 gives every layer the same learning rate."
        )
    parts = [clip_by_global_norm(clip)] if clip else []
    parts += [
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask(params)),
    ]
    if layer_decay != 1.0:
        scales = layer_scales(params, depth, layer_decay)
        parts.append(optax.stateless(lambda u, _: jax.tree.map(lambda x, s: x * s, u, scales)))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _names(path: tuple) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]


def _layer(names: list[str], depth: int) -> int:
    for name in names:
        if name in _INPUT_NAMES:
            return 0
        if match := re.fullmatch(r"block_(\d+)", name):
            # Extra blocks behind the encoder (BEiT v2's CLS branch) are not the encoder's.
            return min(int(match[1]), depth) + 1
    return depth + 1


def _check_adam(b1: float, b2: float, eps: float) -> None:
    for key, value in (("b1", b1), ("b2", b2)):
        if not 0.0 <= value < 1.0:
            raise UserError(f"config.optimizer.{key} is {value}: set a number from 0 to below 1.")
    if not eps > 0.0:
        raise UserError(f"config.optimizer.eps is {eps}: set a number above 0, such as 1e-8.")


def _refuse_negative(key: str, value: float) -> None:
    if not value >= 0:
        raise UserError(f"config.optimizer.{key} is {value}: set 0 or more.")
