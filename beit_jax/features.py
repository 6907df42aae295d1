"""Frozen features: one extractor behind k-NN, the linear probe and the Python API.

from beit_jax import features
encoder = features.load("runs/mim_base")
vectors = encoder(images)  # uint8 [B, H, W, channels] -> float32 [B, D]
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from beit_jax import checkpoint
from beit_jax.architecture import make_encoder
from beit_jax.augment import normalize
from beit_jax.data.geometry import View, center_box, resize
from beit_jax.errors import UserError
from beit_jax.task import Batch, Weights

POOLINGS = ("mean", "cls")
PIXELS = ("pixels", 0)  # raw pixels, in the place of (pooling, block)
KNN_TEMPERATURE = 0.07  # of the votes' softmax weights, as in DINO's evaluation (Caron et al. 2021)


def make_extractor(config: Mapping) -> Callable[[dict, jax.Array], dict[str, jax.Array]]:
    """Returns `(encoder params, uint8 images [B, H, W, ch]) -> {pooling: float32 [B, blocks, D]}`.

    Features are the states after every block, before any norm: the mean of the patches, and CLS
    (official: run_linear_eval.py).
    """
    encoder = make_encoder(config)
    mean, std = config["model"]["mean"], config["model"]["std"]

    def extract(params, images):
        states = encoder.apply({"params": params}, normalize(images, mean, std)).states
        states = jnp.stack(states, axis=1).astype(jnp.float32)  # [B, blocks, L, D]
        return {"mean": states[:, :, 1:].mean(2), "cls": states[:, :, 0]}

    return extract


class Encoder:
    """A trained encoder as a function of NumPy images, with its own preprocessing."""

    def __init__(self, weights: checkpoint.Weights):
        if "patch_embed" not in weights.params.get("encoder", {}):
            raise UserError(
                f"{weights.source} holds no encoder; name a run of task mim or classify."
            )
        self.config = weights.config
        self._params = jax.device_put(weights.params["encoder"])
        self._extract = jax.jit(make_extractor(weights.config))

    def __call__(self, images: np.ndarray, *, block: int = -1, pooling: str = "mean") -> np.ndarray:
        """Features of images of any size.

        Args:
          images: uint8 [B, H, W, channels]; resized and centre-cropped as in evaluation.
          block: which block's output, 0 the first, -1 the last.
          pooling: "mean" of the patches, or "cls".

        Returns:
          float32 [B, D].
        """
        data, depth = self.config["data"], self.config["model"]["depth"]
        images = np.asarray(images)
        if pooling not in POOLINGS or not -depth <= block < depth:
            raise UserError(
                f"block={block} and pooling={pooling!r} are not all known; the encoder has "
                f"{depth} blocks, and pooling is one of {', '.join(POOLINGS)}."
            )
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != data["channels"]:
            raise UserError(
                f"images are {images.dtype} {images.shape}; the encoder reads uint8 "
                f"[B, H, W, {data['channels']}]."
            )
        view = View(tuple(data["image_size"]), data["interpolation"])
        box = center_box(*images.shape[1:3], view.size, data["eval_crop"])
        crop = [resize(image, view, box) for image in images]
        return np.asarray(self._extract(self._params, np.stack(crop))[pooling][:, block])


def load(path: str) -> Encoder:
    """Loads the encoder of a run's folder, or of one of its `checkpoints/<step>` folders."""
    return Encoder(checkpoint.load_weights(str(path), "features.load: path"))


def make_evaluator(config, class_names: tuple[str, ...]):
    """What frozen features are worth: weighted k-NN and a linear probe, as a task's evaluator.

    Block and pooling are chosen on `config.eval.select_split` and the score is that choice's on
    `config.data.eval_split`. Where the two are one split, the score is of the best choice there.
    """
    if not class_names:
        raise UserError(
            f"config.eval.knn and config.eval.probe need labels, and {config.data.source} has "
            "none; switch them off or sort the images into one sub-folder a class."
        )
    extract = jax.jit(make_extractor(config))

    def collect(params, batches: Iterator[Batch]):
        """{name: [n, D]} over the blocks and poolings, and labels [n]."""
        rows, labels = [], []
        for batch in batches:
            values = extract(params, batch["image"])
            if config.eval.pixels:
                values[PIXELS[0]] = batch["image"].reshape(len(batch["image"]), 1, -1)
            host = multihost_utils.process_allgather(
                (values, batch["label"], batch["valid"]), tiled=True
            )
            values, label, valid = jax.tree.map(np.asarray, host)
            valid = valid & (label >= 0)  # an image outside the classes teaches and tests nothing
            rows.append({p: v[valid] for p, v in values.items()})
            labels.append(label[valid])
        features = {
            (pooling, block): np.concatenate([row[pooling][:, block] for row in rows])
            for pooling in rows[0]
            for block in range(rows[0][pooling].shape[1])
        }
        return features, np.concatenate(labels)

    def evaluator(weights: Weights, batches):
        params = weights.params["encoder"]
        train, select = (
            collect(params, batches(s)) for s in (config.data.train_split, config.eval.select_split)
        )
        same = config.eval.select_split == config.data.eval_split
        test = select if same else collect(params, batches(config.data.eval_split))
        classifiers = {}
        if config.eval.knn:
            classifiers["knn"] = lambda: knn_classifier(config.eval.knn)
        if config.eval.probe:
            classifiers["probe"] = linear_classifier
        scores = {}
        for name, make in classifiers.items():
            scores |= _choose_and_score(name, make, train, select, test)
        return scores, {}

    return evaluator


def _choose_and_score(name: str, make: Callable, train, select, test) -> dict[str, float]:
    """Fits one classifier a feature on `train`, chooses by `select`, scores the choice on `test`.

    Each split is (features by (pooling, block), labels); raw pixels are scored, never chosen.
    """
    fitted = {key: make().fit(x, train[1]) for key, x in train[0].items()}
    scores = {}
    if PIXELS in fitted:
        scores[f"pixel_{name}"] = fitted.pop(PIXELS).score(test[0][PIXELS], test[1])
    best = max(fitted, key=lambda key: fitted[key].score(select[0][key], select[1]))
    return scores | {
        name: fitted[best].score(test[0][best], test[1]),
        f"{name}_block": best[1],
        f"{name}_from_cls": int(best[0] == "cls"),
    }


def knn_classifier(neighbors: int):
    """Exact k-NN by cosine similarity, votes weighted exp(similarity / 0.07)."""
    return KNeighborsClassifier(
        neighbors, metric="cosine", weights=lambda d: np.exp((1 - d) / KNN_TEMPERATURE)
    )


def linear_classifier():
    """Logistic regression on standardised features, solved to convergence."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
