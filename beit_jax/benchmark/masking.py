"""How fast masks are drawn."""

import argparse
import math
import random
import statistics
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from beit_jax import masking
from beit_jax.benchmark import timing
from beit_jax.tasks import mim

MASKS = 1024  # of a turn


def measure(config: ConfigDict, folder: Path, options: argparse.Namespace) -> dict:
    """Block masks of the config on the device, beside one at a time in a Python loop."""
    del folder
    grid, rule = mim.patch_grid(config), config.mask
    number = masking.num_masked_patches(
        rule.share, grid, kind="blockwise", min_block=rule.min_block, aspect=rule.aspect
    )

    def draw(key):
        mask = masking.blockwise_mask(
            key, grid, number, min_block=rule.min_block, aspect=rule.aspect
        )
        return masking.masked_indices(mask, number)

    drawn = jax.jit(jax.vmap(draw))
    keys = jax.random.split(jax.random.key(0), MASKS)
    chance = random.Random(0)

    def python_loop():
        for _ in range(MASKS):
            mask_in_python(chance, grid, number, rule.min_block, rule.aspect)

    starts = timing.starts()
    programs = {
        "device": lambda: jax.block_until_ready([drawn(keys) for _ in range(starts)]),
        "python": python_loop,
    }
    seconds = timing.in_turns(programs, options.repeats)
    return {
        "masks_per_second": starts * MASKS / statistics.median(seconds["device"]),
        "masks_per_second_in_python": MASKS / statistics.median(seconds["python"]),
        "times_as_fast": starts * timing.ratio(seconds["python"], seconds["device"]),
    }


def mask_in_python(
    chance: random.Random, grid: tuple[int, int], wanted: int, min_block: int, aspect: float
) -> np.ndarray:
    """A mask bool [h, w] of at most `wanted` patches, as in Bao et al. 2021, algorithm 1.

    The kind of loop that data loaders run for every image: each block has ten tries, and patches
    are set one by one, as in beit/masking_generator.py.
    """
    height, width = grid
    mask, left = np.zeros(grid, bool), wanted
    while left > 0:
        for _ in range(10):
            area = chance.uniform(min_block, left)
            ratio = math.exp(chance.uniform(math.log(aspect), -math.log(aspect)))
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall >= height or wide >= width:
                continue
            top, first = chance.randint(0, height - tall), chance.randint(0, width - wide)
            new = tall * wide - mask[top : top + tall, first : first + wide].sum()
            if 0 < new <= left:
                for row in range(top, top + tall):
                    for column in range(first, first + wide):
                        if not mask[row, column]:
                            mask[row, column] = True
                left -= new
                break
        else:
            return mask
    return mask
