"""A run's weights in the files of another project."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from beit_jax.architecture import patch_grid
from beit_jax.errors import UserError
from beit_jax.interop import beit, dall_e, hugging_face, hugging_face_config, segmentation, vqkd
from beit_jax.interop.table import Table, export_params, listed

Variables = Mapping[str, Any]


class Exported(NamedTuple):
    """What belongs into the files."""

    tensors: dict[str, np.ndarray]
    jsons: dict[str, dict]  # file name -> content of the files beside the weights
    left_out: dict[str, str]  # our modules -> why
    unsaid: tuple[str, ...] = ()  # what a reader of the files must be told, one sentence each


def export(
    config: Mapping, variables: Variables, style: str, names: Sequence[str] = ()
) -> Exported:
    """Names a run's weights as another project does.

    Args:
      config: the run's resolved config, nested.
      variables: all collections of its network.
      style: one of STYLES.
      names: of the head's classes, where they are known; only Hugging Face's files hold them.

    Raises:
      UserError: where the other project has no such network.
    """
    return STYLES[style](config, variables, names)


def _hugging_face(config: Mapping, variables: Variables, names: Sequence[str]) -> Exported:
    left_out = hugging_face_config.inexpressible(config)
    kept = _without(variables, left_out)
    tensors = export_params(hugging_face.TABLES[config["task"]], kept)
    outputs = outputs_of(variables["params"])
    jsons = {
        "config.json": hugging_face_config.config_json(config, outputs, names),
        "preprocessor_config.json": hugging_face_config.preprocessor_json(config),
    }
    return Exported(tensors, jsons, _present(left_out, variables))


def _official(config: Mapping, variables: Variables, names: Sequence[str]) -> Exported:
    del names
    tables: dict[str, Callable[[Mapping], Table]] = {
        **dict.fromkeys(("mim", "classify", "encoder"), beit.BEIT.table),
        "vqkd": vqkd.VQKD.table,
        "dvae": dall_e.DALL_E.table,
        "segment": segmentation.SEGMENTATION.table,
    }
    task = config["task"]
    if task not in tables:
        raise UserError(
            f"Microsoft's code has no network of task {task!r}; it has {', '.join(tables)}"
        )
    tensors = export_params(tables[task](config), _tree(variables))
    return Exported(tensors, {}, {}, _unsaid(config, "Microsoft's code"))


def _timm(config: Mapping, variables: Variables, names: Sequence[str]) -> Exported:
    del names
    if config["task"] not in ("mim", "classify", "encoder"):
        raise UserError(f"timm has no network of task {config['task']!r}; it has BEiT's encoder")
    why = "is for pre-training, which timm's BEiT does not do"
    left_out = dict.fromkeys(("lm_head", "cls_norm", "cls_lm_head"), why)
    left_out |= {f"cls_block_{j}": why for j in range(config["model"]["head_layers"])}
    kept = _without(variables, left_out)
    kept["encoder"] = {n: leaf for n, leaf in kept["encoder"].items() if n != "mask_token"}
    left_out["encoder/mask_token"] = why
    table = beit.official(patch_grid(config))._replace(buffers=())
    tensors, left_out = export_params(table, kept), _present(left_out, variables)
    return Exported(tensors, {}, left_out, _unsaid(config, "timm"))


def _unsaid(config: Mapping, whose: str) -> tuple[str, ...]:
    """What tensors do not tell and their reader must know; refuses what `whose` cannot do."""
    task, model, data = config["task"], config["model"], config["data"]
    if task == "dvae":
        return ()
    if model["activation"] != "gelu" or model["norm_pre"] or not model["patch_bias"]:
        raise UserError(
            f"{whose} has no BEiT with activation={model['activation']}, norm_pre="
            f"{model['norm_pre']} and patch_bias={model['patch_bias']}: there is no such file"
        )
    said = [
        f"pixels in [0, 1] are normalised with mean {model['mean']} and std {model['std']}, and "
        f"resized with {data['interpolation']} interpolation, centre share {data['eval_crop']}"
    ]
    if "relative" not in model["positions"]:
        said.append(f"{model['heads']} attention heads")
    if model["norm_epsilon"] != 1e-6:
        said.append(f"LayerNorms add {model['norm_epsilon']} to the variance, there it is 1e-06")
    if task == "mim" and model["early_layers"]:
        said.append(f"the CLS branch starts after {model['early_layers']} blocks")
    if task == "segment":
        taps, pools = config["segment"]["taps"], config["segment"]["pools"]
        said.append(f"levels are read after {taps} blocks, and averaged over {pools} cells")
    return tuple(said)


STYLES = {"hf": _hugging_face, "unilm": _official, "timm": _timm}


def outputs_of(params: Mapping) -> int:
    """Codes, classes or width of the projection of a network's head; 0: it has none."""
    for head in ("lm_head", "head", "projection", "decode_classes"):
        if head in params:
            return params[head]["kernel"].shape[-1]
    return 0


def _tree(variables: Variables) -> Mapping:
    """What tables speak of: the parameters alone, or all collections where there are others."""
    return variables if len(variables) > 1 else variables["params"]


def _without(variables: Variables, modules: Mapping[str, str]) -> dict:
    params = {name: tree for name, tree in variables["params"].items() if name not in modules}
    return dict(_tree({**variables, "params": params}))


def _present(left_out: Mapping[str, str], variables: Variables) -> dict[str, str]:
    params = variables["params"]
    names = {*params, *(f"encoder/{name}" for name in params["encoder"])}
    return {name: why for name, why in left_out.items() if name in names}


def said(left_out: Mapping[str, str]) -> list[str]:
    """One line for each reason why something was left out."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    return [f"{listed(names)}: {why}" for why, names in reasons.items()]
