"""The pages' commands are run from top to bottom, as a reader would, on small data and networks.

What else they say (benchmarks, launchers, recipes' headers) is parsed by test_readme.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import archive_makers
import cv2
import numpy as np
import pytest
import tiny
from absl.testing import flagsaver

from beit_jax import convert, main, prepare
from beit_jax.report import __main__ as report
from configs import mim_base, vqkd_base_clip

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
# In place of what a page says of the same keys.
SMALL = {
    "data.image_size": (64, 64), "data.workers": 0, "data.holdout": 0.25, "mask.min_block": 4,
    "model.width": 48, "model.depth": 4, "model.heads": 12, "dvae.width": 8,
    "dvae.blocks_per_group": 1, "dvae.dtype": "float32", "model.dtype": "float32",
    "dvae.vocabulary": 16, "dvae.decoder_input": 8, "vqkd.codes": 16, "segment.short_side": 64,
    "segment.stride": 48, "segment.taps": (1, 2, 3, 4), "segment.auxiliary_width": 8,
    "train.batch_size": 8, "train.steps": 1, "train.eval_every": 0, "eval.batch_size": 8,
    "optimizer.warmup_epochs": 0.0, "optimizer.warmup_steps": 0,
}  # fmt: skip
MODEL = {"data.image_size", "model.width", "model.depth", "model.heads"}
BRANCHED = {"mim_v2_base": {"model.early_layers": 2}}


def commands(page: str) -> list[str]:
    """Every `python -m beit_jax...` of a page, from the module on, in their order."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"^python -m (beit_jax[^\n#]*)", text, re.M)
    return [" ".join(command.split()) for command in found]


def smaller(words: list[str]) -> list[str]:
    """A command of main with small networks, if it trains; with small blocks, if it evaluates."""
    name = next((Path(w.split(":")[0]).stem for w in words if w.startswith("--config=")), "")
    if not name:
        return words + ["--config.mask.min_block=4"] * ("--mode=eval" in words)
    changes = SMALL | BRANCHED.get(name, {})
    kept = [w for w in words if w.split("=")[0].removeprefix("--config.") not in changes]
    return kept + [f"--config.{key}={value}" for key, value in changes.items()]


def run(words: list[str]) -> None:
    """Runs one command in this process, as its module would."""
    module, *rest = words
    if module == "beit_jax.main":
        sys.argv = [module, *smaller(rest)]
        with flagsaver.flagsaver():
            main.main(main.parse(sys.argv))
        return
    command = {"beit_jax.convert": convert, "beit_jax.prepare": prepare, "beit_jax.report": report}
    assert command[module].main(rest) == 0, words


@pytest.fixture
def folder(tmp_path):
    """Where the reader works: photographs, archives and files from elsewhere, all of them tiny."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("PHOTOS", "LABELLED", "OTHERS", "NEW"):
        for number in range(24):
            path = tmp_path / name / f"class_{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive_makers.picture(number, 40))
    for split in ("training", "validation"):
        for number in range(8):
            for kind in ("images", "annotations"):
                (tmp_path / "ADEChallengeData2016" / kind / split).mkdir(
                    parents=True, exist_ok=True
                )
            name = tmp_path / "ADEChallengeData2016" / "images" / split / f"{number}.jpg"
            name.write_bytes(archive_makers.picture(number, 64))
            labels = np.full((64, 64), 1 + number, np.uint8)
            cv2.imwrite(str(name).replace("images", "annotations")[:-3] + "png", labels)
    archive_makers.make_imagenet(tmp_path / "DOWNLOADS", per_class=70, validation=8)
    shutil.copytree(GOLDEN / "dall_e", tmp_path / "downloads" / "dall_e")
    shutil.copytree(GOLDEN / "hf_beit_mim", tmp_path / "their_folder")
    shutil.move(
        tmp_path / "their_folder" / "tensors.safetensors", tmp_path / "expected.safetensors"
    )
    published = mim_base.get_config()
    published.update_from_flattened_dict({k: v for k, v in SMALL.items() if k in MODEL})
    tiny.random_network(tmp_path / "published", published, 512)  # codes, as that DALL-E has
    weights = tmp_path / "beit_base_patch16_224_pt22k.pth"
    convert.main(["export", str(tmp_path / "published"), str(weights), "--format=unilm"])
    teacher = vqkd_base_clip.get_config()  # CLIP's names and outputs, as an import would leave it
    teacher.task, teacher.model.width, teacher.model.depth, teacher.model.heads = "teacher", 8, 1, 1
    teacher.data.image_size = SMALL["data.image_size"]
    tiny.random_network(tmp_path / "runs" / "clip", teacher, 512)
    return tmp_path


@pytest.mark.parametrize("pages", [["README.md", "docs/weights.md"], ["docs/tutorial.md"]])
def test_the_commands_of_pages_run_one_after_the_other(pages, folder):
    """In a process of their own, on one device."""
    done = subprocess.run(
        [sys.executable, __file__, *pages],
        env=os.environ
        | tiny.on_devices(1)
        | {
            "PYTHONPATH": str(ROOT),
            "TFDS_DATA_DIR": str(folder / "tensorflow_datasets"),  # other tests want it empty
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    for line in dict.fromkeys(line for page in sys.argv[1:] for line in commands(page)):
        if not line.startswith("beit_jax.benchmark"):
            print(line, flush=True)
            run(shlex.split(line))
