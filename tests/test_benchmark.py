"""The benchmark: FLOPs counted right, parts that add up, and every command in small."""

import itertools
import json
import time

import jax
import jax.numpy as jnp
import pytest

from beit_jax.architecture import images_of, make_masked_image_model
from beit_jax.benchmark import __main__ as benchmark
from beit_jax.benchmark import profile, timing
from beit_jax.benchmark.flops import matrix_flops
from beit_jax.benchmark.masking import mask_in_python
from configs import mim_base

DIGITS = ["--config=configs/digits_mim.py", "--config.train.batch_size=8", "--repeats=1"]


def run(capsys, *arguments: str) -> dict:
    assert benchmark.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flops_of_base_are_those_on_paper():
    """Per image: 12 blocks over L tokens, the patches' embedding, and on M tokens the head and what
    follows the last block's attention."""
    config = mim_base.get_config()
    width, length, masked, vocabulary = 768, 197, 75, 8192
    model = make_masked_image_model(config, vocabulary)
    images, indices = images_of(config, 2), jax.ShapeDtypeStruct((2, masked), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, indices)
    block = 2 * length * width * 12 * width + 2 * 2 * length**2 * width
    forward = 12 * block - 2 * (length - masked) * width * 9 * width
    forward += 2 * 196 * (16 * 16 * 3) * width + 2 * masked * width * vocabulary
    assert matrix_flops(model.apply, params, images, indices) == 2 * forward

    def loss(params):
        return model.apply(params, images_, indices_)[0].sum()

    images_, indices_ = (jnp.zeros(x.shape, x.dtype) for x in (images, indices))
    # Backward twice forward, but that images have no gradient, and that of the relative bias is a
    # sum over the batch in every block.
    backward = 2 * forward - 2 * 196 * (16 * 16 * 3) * width + 12 * 2 * 12 * length**2
    assert matrix_flops(jax.grad(loss), params) == 2 * (forward + backward)


def test_of_a_turns_two_runs_the_second_counts():
    waits = itertools.cycle([0.2, 0.0])
    found = timing.in_turns({"program": lambda: time.sleep(next(waits))}, 3)
    assert len(found["program"]) == 3 and max(found["program"]) < 0.1


def test_flops_follow_loops_and_convolutions():
    x = jnp.zeros((4, 8, 8))

    def repeated(x):
        return jax.lax.scan(lambda carry, _: (jax.jit(jnp.matmul)(carry, carry), None), x, None, 5)

    assert matrix_flops(repeated, x) == 5 * 4 * 2 * 8**3
    image, kernel = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 7))
    layout = ("NHWC", "HWIO", "NHWC")

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=layout
        )

    assert matrix_flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)


def test_parts_of_a_program_add_up():
    def fn(x):
        with jax.named_scope("encoder"):
            x = jnp.tanh(x @ x)
        with jax.named_scope("optimizer"):
            return (x @ x @ x).sum()

    x = jnp.ones((256, 256))
    compiled = jax.jit(jax.grad(fn)).lower(x).compile()

    def program():
        jax.block_until_ready(compiled(x))

    shares = profile.part_shares(program, compiled.as_text(), ("encoder", "optimizer", "absent"))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["encoder"] > 0.05 and shares["optimizer"] > 0.05 and shares["absent"] == 0


def test_a_step_is_measured_with_its_tokenizer_and_without(capsys):
    found = run(capsys, "train", *DIGITS, "--config.dvae.width=8")
    step, bare = found["step"], found["step_without_tokenizer"]
    half = run(capsys, "train", *DIGITS, "--config.dvae.width=8", "--config.model.dtype=bfloat16")
    assert half["step"]["model_flops_per_image"] == step["model_flops_per_image"]
    assert step["model_flops_per_image"] > bare["model_flops_per_image"] > 0
    assert bare["xla_flops_per_image"] == pytest.approx(bare["model_flops_per_image"], rel=0.5)
    assert step["median_seconds"] > 0 and step["memory_bytes"] > 0 and step["compile_seconds"] > 0
    parts = found["parts_of_the_step"]
    assert sum(parts.values()) == pytest.approx(1)
    assert all(parts[f"{part}_share"] > 0 for part in ("tokenizer", "encoder", "optimizer"))


def test_other_commands_measure_what_they_say(capsys):
    masks = run(capsys, "masking", "--repeats=1")
    assert masks["masks_per_second"] > 0 and masks["times_as_fast"] > 0
    saves = run(capsys, "checkpoint", *DIGITS)
    assert saves["checkpoint_bytes"] > 1e5 and 0 < saves["lost_share"] < 1
    loaded = run(capsys, "input", "--repeats=1", "--config.data.workers=2")
    assert "folder:" in loaded["data"] and loaded["times_as_fast_as_pil"] > 0


def test_a_table_is_for_people(capsys):
    assert benchmark.main(["masking", "--repeats=1"]) == 0
    assert "masks per second" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "--config.trian.steps=1"], "train"),
        (["masking", "--repeats=0"], "--repeats=0 must be at least 1"),
        (["masking", "--workers=3"], "'--workers=3' is not a flag here"),
        (["masking", "--config=configs/nothing.py"], "nothing.py"),
        (["train", "--peer", "--config=configs/digits_vqkd.py"], "--peer compares"),
    ],
)
def test_mistakes_get_one_sentence(arguments, said, capsys):
    assert benchmark.main(arguments) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_the_python_loop_masks_at_most_what_is_wanted():
    import random

    counts = [
        mask_in_python(random.Random(seed), (14, 14), 75, 16, 0.3).sum() for seed in range(50)
    ]
    assert max(counts) <= 75 and sum(counts) / len(counts) == pytest.approx(74.5, abs=0.6)
