"""The peer: Hugging Face's BEiT in PyTorch, doing the same work on the same images."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import numpy as np

from beit_jax.errors import UserError
from beit_jax.tasks import mim


def libraries(config) -> tuple[ModuleType, ModuleType]:
    """PyTorch and transformers.

    Raises:
      UserError: they are missing, or the peer cannot do what the config asks for.
    """
    if config.task != "mim" or config.model.early_layers:
        raise UserError("--peer compares BEiT's pre-training alone: take configs/mim_base.py.")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--peer needs PyTorch and transformers ({error}): pip install -e '.[peers]'."
        ) from error
    return torch, transformers


class Peer:
    """A training step of the peer on one batch."""

    def __init__(self, torch: ModuleType, network, optimizer, clip: float, loss: Callable):
        """`loss` takes the network."""
        self._torch, self._network, self._optimizer = torch, network, optimizer
        self._clip, self._loss = clip, loss

    def update(self) -> None:
        """Makes one update; on a GPU it may still be at it afterwards."""
        loss = self._loss(self._network)
        self._optimizer.zero_grad()
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._clip)
        self._optimizer.step()

    def wait(self) -> None:
        """Returns when all updates are made."""
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()


def make(config, images: jax.Array, torch: ModuleType, transformers: ModuleType) -> dict[str, Peer]:
    """Training steps of the peer: its head on the masked tokens as ours, and as it comes.

    Same sizes, drop path, masked share, optimizer and clipping; bfloat16 autocast and torch.compile
    on a GPU, float32 on a CPU. It has neither tokenizer nor colour jitter.

    Args:
      config: a recipe of task mim.
      images: uint8 [B, H, W, ch], what both see.
      torch, transformers: see `libraries`.
    """
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    masked = torch.tensor(_masked(config, len(images)), device=device)
    rows = masked.flatten().nonzero()[:, 0]  # known before the step, so that it compiles whole
    pixels = np.array(images, np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    pixels = torch.tensor(pixels, device=device)
    labels = torch.randint(config.dvae.vocabulary, rows.shape, device=device)

    def program(loss: Callable) -> Peer:
        network = transformers.BeitForMaskedImageModeling(_describe(config, transformers))
        network = network.train().to(device)
        forward = torch.compile(loss) if gpu else loss
        c = config.optimizer
        optimizer = torch.optim.AdamW(
            network.parameters(),
            c.learning_rate,
            (c.b1, c.b2),
            weight_decay=c.weight_decay,
            fused=gpu,
        )

        def autocast_loss(network):
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                return forward(network, pixels, masked, labels)

        return Peer(torch, network, optimizer, c.clip, autocast_loss)

    return {
        "peer": program(partial(_masked_loss, rows=rows)),
        "peer_with_every_logit": program(_whole_loss),
    }


def _masked_loss(network, pixels, masked, labels, rows):
    """The loss with norm and head on the masked patches alone, as ours."""
    states = network.beit(pixels, bool_masked_pos=masked).last_hidden_state[:, 1:]
    logits = network.lm_head(network.layernorm(states.flatten(0, 1)[rows]))
    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()


def _whole_loss(network, pixels, masked, labels):
    return network(pixels, bool_masked_pos=masked, labels=labels).loss


def _masked(config, batch: int) -> np.ndarray:
    """Which patches of a batch are masked: bool [B, N]."""
    height, width = mim.patch_grid(config)
    number = round(config.mask.share * height * width)
    chance = np.random.default_rng(0).random((batch, height * width))
    return chance.argsort(1) < number


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
