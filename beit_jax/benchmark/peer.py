"""The peer: Hugging Face's BEiT in PyTorch, doing the same work on the same images."""

from collections.abc import Callable

import jax
import numpy as np

from beit_jax.errors import UserError
from beit_jax.tasks import mim


def make(config, images: jax.Array) -> dict[str, Callable[[], None]]:
    """Training steps of the peer: its head on the masked tokens as ours, and as it comes.

    Same sizes, drop path, masked share, optimizer and clipping; bfloat16 autocast and torch.compile
    on a GPU, float32 on a CPU. It has neither tokenizer nor colour jitter.

    Args:
      config: a recipe of task mim.
      images: uint8 [B, H, W, ch], what both see.

    Raises:
      UserError: PyTorch is missing, or the peer cannot do what the config asks for.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--peer needs PyTorch and transformers ({error}): pip install -e '.[peers]'."
        ) from error
    if config.task != "mim" or config.model.early_layers:
        raise UserError("--peer compares BEiT's pre-training alone: take configs/mim_base.py.")
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    rows, masked = _masked(config, len(images))
    pixels = np.array(images, np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    pixels, masked = torch.tensor(pixels, device=device), torch.tensor(masked, device=device)
    labels = torch.randint(config.dvae.vocabulary, (rows,), device=device)

    def program(restricted: bool) -> Callable[[], None]:
        network = transformers.BeitForMaskedImageModeling(_describe(config, transformers))
        network = network.train().to(device)
        forward = torch.compile(_loss(restricted)) if gpu else _loss(restricted)
        c = config.optimizer
        optimizer = torch.optim.AdamW(
            network.parameters(), c.learning_rate, (c.b1, c.b2), weight_decay=c.weight_decay
        )

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = forward(network, pixels, masked, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), c.clip)
            optimizer.step()
            if gpu:
                torch.cuda.synchronize()

        return step

    return {"peer": program(restricted=True), "peer_with_every_logit": program(restricted=False)}


def _loss(restricted: bool):
    def masked_only(network, pixels, masked, labels):
        import torch

        states = network.beit(pixels, bool_masked_pos=masked).last_hidden_state[:, 1:]
        logits = network.lm_head(network.layernorm(states[masked]))
        return torch.nn.functional.cross_entropy(logits, labels)

    def whole(network, pixels, masked, labels):
        return network(pixels, bool_masked_pos=masked, labels=labels).loss

    return masked_only if restricted else whole


def _masked(config, batch: int) -> tuple[int, np.ndarray]:
    """How many patches of a batch are masked, and which: bool [B, N]."""
    height, width = mim.patch_grid(config)
    number = round(config.mask.share * height * width)
    chance = np.random.default_rng(0).random((batch, height * width))
    return batch * number, chance.argsort(1) < number


def _describe(config, transformers):
    model = config.model
    positions = model.positions.split("+")
    return transformers.BeitConfig(
        vocab_size=config.dvae.vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        intermediate_size=round(model.width * model.mlp_ratio),
        image_size=config.data.image_size[0],
        patch_size=model.patch_size,
        num_channels=config.data.channels,
        drop_path_rate=model.drop_path,
        layer_scale_init_value=model.layer_scale,
        layer_norm_eps=model.norm_epsilon,
        use_mask_token=True,
        use_absolute_position_embeddings="absolute" in positions,
        use_relative_position_bias="relative" in positions,
        use_shared_relative_position_bias="shared_relative" in positions,
    )
