"""One module per task; each `build` unpacks the config into one `Task` of pure functions."""

from collections.abc import Callable
from pathlib import Path

from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.task import Task
from beit_jax.tasks import classify, dvae, mim, pixel_decoder, probe, segment, vqkd

BUILDERS: dict[str, Callable[..., Task]] = {
    "dvae": dvae.build,
    "vqkd": vqkd.build,
    "pixel_decoder": pixel_decoder.build,
    "mim": mim.build,
    "classify": classify.build,
    "probe": probe.build,
    "segment": segment.build,
}
ANSWERING = ("classify", "segment")  # tasks whose predictions are for a person to read


def build(config, source: Source, run: Path) -> Task:
    """Builds the task that `config.task` names.

    Args:
      config: the resolved config.
      source: the training data; its `class_names` are empty where it has no labels.
      run: the run's folder, which holds or receives frozen networks.
    """
    if config.task not in BUILDERS:
        raise UserError(
            f"config.task={config.task!r} is unknown; choose one of {', '.join(sorted(BUILDERS))}."
        )
    return BUILDERS[config.task](config, source, run)
