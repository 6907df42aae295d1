"""How well a codebook is used and what its codes stand for, in numbers and as pictures."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from beit_jax.augment import to_unit
from beit_jax.pictures import lay_out, picture_rows


def health(counts: jax.Array) -> dict[str, jax.Array]:
    """Share of the K codes that occur, and exp of the entropy of their frequencies [K]."""
    share = counts / counts.sum()
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1))).sum()
    return {"usage": (counts > 0).mean(), "perplexity": jnp.exp(entropy)}


def gallery(images: np.ndarray, tokens: np.ndarray, codes: int = 8, count: int = 8) -> np.ndarray:
    """What the commonest codes stand for: a row is a code.

    Its first tile shows how often each place of the grid gets it (white: most often), the others
    patches that get it, each in the middle of its eight neighbours.

    Args:
      images: [B, H, W, ch] in [0, 1].
      tokens: int [B, h, w].
      codes: rows.
      count: tiles of a row, at most.

    Returns:
      uint8 [height, width, 3].
    """
    size = images.shape[1] // tokens.shape[1]
    around = np.pad(images, ((0, 0), (size, size), (size, size), (0, 0)), mode="edge")
    commonest = np.argsort(-np.bincount(tokens.ravel()), kind="stable")[:codes]
    rows = []
    for code in commonest:
        found = np.argwhere(tokens == code)  # [n, 3], by image
        spread = np.linspace(0, len(found) - 1, min(len(found), count - 1)).astype(int)
        tiles = [
            around[b, y * size : (y + 3) * size, x * size : (x + 3) * size]
            for b, y, x in found[spread]
        ]
        tiles += [np.ones_like(around[0, : 3 * size, : 3 * size])] * (count - 1 - len(tiles))
        places = (tokens == code).mean(axis=0)
        heat = Image.fromarray(np.uint8(255 * places / max(places.max(), 1e-9)))
        heat = np.asarray(heat.resize((3 * size, 3 * size), Image.Resampling.NEAREST)) / 255
        rows.append(
            np.stack(
                [np.broadcast_to(heat[..., None], around[0, : 3 * size, : 3 * size].shape), *tiles]
            )
        )
    return lay_out(*rows)


def gallery_evaluator(predict, split: str):
    """The `gallery` of the first batch of a split; `predict` gives tokens."""
    tokens_of = jax.jit(predict)

    def evaluator(weights, batches):
        batch = next(batches(split))
        found = (to_unit(batch["image"]), tokens_of(weights, batch), batch["valid"])
        host = multihost_utils.process_allgather(found, tiled=True)
        images, tokens, valid = (np.asarray(array) for array in host)
        return {}, {"codes": gallery(images[valid], tokens[valid])}

    return evaluator


def reconstruction_evaluator(predict, split: str):
    """Images above what became of them by way of their tokens; `predict` gives tokens, pictures."""
    draw = jax.jit(lambda weights, batch: predict(weights, batch)[1])

    def evaluator(weights, batches):
        batch = next(batches(split))
        return {}, {"reconstruction": picture_rows(to_unit(batch["image"]), draw(weights, batch))}

    return evaluator
