"""The output of the target's last decoder layer, for drafts that read it.

SGLang captures features before the layer that follows, and nothing follows the last one. Its final norm takes a
callback that is given the residual stream, which is that output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from domino_spec.draft.config import DraftConfig
from domino_spec.settings import UserError


def tap_last_layer(model: Any, settings: DraftConfig) -> None:
    """Append the last layer's output to the features of every forward pass.

    Args:
        model: SGLang's target model.
        settings: of the draft; the last layer is the last of `target_layer_ids`.

    Raises:
        UserError: the target is built in a way in which it cannot be tapped.
    """
    from sglang.srt.layers.layer_boundary.residual import batch

    decoder: Any = getattr(model, "model", None)
    norm = getattr(decoder, "norm", None)
    name = type(model).__name__
    if norm is None or not hasattr(decoder, "layers_to_capture"):
        raise UserError(f"this draft reads the target's last layer, which SGLang's {name} does not show")
    if len(settings.target_layer_ids) == 1 or max(settings.target_layer_ids) != settings.target_layer_ids[-1]:
        raise UserError("a draft that reads the target's last layer must name it behind others in target_layer_ids")
    captured: list[Tensor] = []
    final_norm = batch.final_norm

    def norm_and_capture(
        hidden_states: Any, forward_batch: Any, layernorm: Any, capture: Any = None, **rest: Any
    ) -> Any:
        if layernorm is norm and capture is None:
            captured.clear()

            def capture(residual: Tensor) -> None:
                captured.append(residual.clone())

        return final_norm(hidden_states, forward_batch, layernorm, capture, **rest)

    def append(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or not isinstance(output[1], list):
            return output
        if not captured:
            raise RuntimeError(f"the last layer of SGLang's {name} could not be tapped, which this draft needs")
        output[1].append(captured.pop())
        return output

    batch.final_norm = norm_and_capture
    decoder.register_forward_hook(append)
