"""A generator on a grid as Composer trains it: state, noise, velocity, error."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lgm_scale.config.schema import FlowObjectiveConfig
from lgm_scale.families.elit.network import SiT
from lgm_scale.flow import contrasted, unweighted_flow_loss
from lgm_scale.pixels import PIXEL_STD, to_unit_range
from lgm_scale.randomness import Purpose, keyed_normal, stream_keys
from lgm_scale.training.flow_model import FlowModel, Predicted


class ELITTrainingModel(FlowModel):
    """Reads batches {labels [B], sample_ids [B], step int, num_tokens int} and a state.

    That is images uint8 [B, 3, S, S] for pixels, or mean and std [B, 4, side, side] of SD-VAE's
    latents, of which every visit draws another sample, keyed on (seed, step, sample id).

    Args:
        net: An `ELIT` or a `SiT`.
        latent_scale: What latents are multiplied by; None for pixels.
    """

    net: SiT

    def __init__(
        self, net: SiT, latent_scale: float | None, objective: FlowObjectiveConfig, seed: int
    ) -> None:
        super().__init__(net, objective, seed)
        self.latent_scale = latent_scale

    def forward(self, batch: dict[str, Any]) -> Predicted:
        """Draw noise and t for this step, and predict the velocity at the step's budget."""
        draws = self.draw(batch)
        z = self.state(batch)
        noise = keyed_normal(draws.keys[Purpose.NOISE], tuple(z.shape[1:]))
        return self.predict(
            lambda z_t, t, labels, *end: self.net(z_t, t, labels, batch["num_tokens"], *end),
            z,
            noise,
            draws,
        )

    def state(self, batch: dict[str, Any]) -> Tensor:
        """What the flow ends at. Shapes: -> [B, channels, side, side] float32."""
        if self.latent_scale is None:
            return to_unit_range(batch["images"]) / PIXEL_STD
        mean, std = batch["mean"].float(), batch["std"].float()
        ids = batch["sample_ids"]
        keys = stream_keys(self.seed, Purpose.LATENT_SAMPLE, batch["step"], ids)
        return (mean + std * keyed_normal(keys, tuple(mean.shape[1:]))) * self.latent_scale

    def loss(self, outputs: Predicted, batch: dict[str, Any]) -> Tensor:
        """Mean over the batch of the squared error, contrasted."""
        error = partial(unweighted_flow_loss, outputs.v_pred)
        loss = contrasted(error, outputs.v_target, self.objective.contrastive)
        return self.noted(loss, outputs.t)
