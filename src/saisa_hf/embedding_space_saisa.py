# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What lies between LLaVA and SAISA: visual tokens enter once, in front of layer 0, and their hidden states travel on.

`SaisaConfig.alignment="embedding_space"`. Two switches, for all decoder layers or for each, say what a layer does to them:

- `visual_attention="full"`: they are queries, and attend as text does to all that stands in front of them;
  `"none"`: they are keys and values only (NAAViT). Their attention output is zero: the residual carries them on.
- `visual_feed_forward`: whether they pass the feed-forward network. Where not, its output is zero for them.

Full attention and feed-forward networks are LLaVA; NAAViT with feed-forward networks is the pilot experiment of the SAISA
paper (arXiv 2502.02458); neither, in some layers, is what ShortV (arXiv 2504.00502) does there.

Shape suffixes as in `modeling_saisa.py`.
"""

from torch import Tensor, nn

from .hardware_saisa import PerDevice
from .token_layout_saisa import Rotation, TokenLayout


class VisualTokensAmongWords(nn.Module):
    """The part of a decoder layer through which visual tokens pass as well; it stands in front of `SaisaDecoderLayer`."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.visual_tokens_attend = config.visual_tokens_attend(layer_idx)
        self.visual_tokens_are_fed = config.visual_tokens_are_fed(layer_idx)

    @property
    def mask_kind(self) -> tuple:
        return self.attention_type, self.visual_tokens_attend

    def queries_of(self, layout: TokenLayout, text_BTD: Tensor) -> tuple[TokenLayout, Tensor]:
        if not self.visual_tokens_attend or layout.visual_BS is None:
            return layout, text_BTD
        return TokenLayout(None), text_BTD.new_empty(*layout.visual_BS.shape, 0)  # they are tokens like all others

    def forward(
        self,
        text_BTD: Tensor,
        visual_VD: Tensor | None = None,
        layout: TokenLayout | None = None,
        rotation: Rotation | None = None,
        **attention_arguments,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states of text tokens and, where the input has them, of visual ones -> both past the layer, and (B, N, S, L)
        attention probabilities or None."""
        if visual_VD is not None and self.visual_tokens_attend:
            x_BSD = layout.joined(text_BTD, visual_VD)
            as_text = {"layout": TokenLayout(None), "rotation": rotation.as_text()}
            x_BSD, probabilities_BNSL = self.attended(x_BSD, None, **as_text, **attention_arguments)
            text_BTD, visual_VD = layout.text(x_BSD), layout.visual(x_BSD)
        else:
            visual = None if visual_VD is None else self.visual_keys_and_values(visual_VD, layout)
            arguments = {"layout": layout, "rotation": rotation, **attention_arguments}
            text_BTD, probabilities_BNSL = self.attended(text_BTD, visual, **arguments)
            if probabilities_BNSL is not None:
                probabilities_BNSL = layout.align_queries(probabilities_BNSL)
        if visual_VD is None or not self.visual_tokens_are_fed:
            return self.fed(text_BTD), visual_VD, probabilities_BNSL
        x_BSD = self.fed(layout.joined(text_BTD, visual_VD))
        return layout.text(x_BSD), layout.visual(x_BSD), probabilities_BNSL


class ThroughEveryLayer:
    """The part of a decoder whose layers hand visual tokens on; it stands in front of `SaisaLanguageModel`."""

    def through_layers(self, text_BTD, visual, layout, rotations, masks, wanted, **kwargs):
        visual_VD = None
        if visual is not None:
            visual_VD = self.family.scaled_input(visual.to(text_BTD.device, text_BTD.dtype))
            if layout.visual_BS is None:  # of no images: only their gradient counts (see `EncodesImages.no_features`)
                text_BTD, visual_VD = layout.joined(text_BTD, visual_VD), None
        hidden_states, attentions = [], []
        per_device = PerDevice(rotations, masks)
        for layer in self.layers:
            if wanted["hidden_states"]:
                hidden_states.append(layout.joined(text_BTD, visual_VD))
            rotations, masks = per_device.on(layer.device)
            text_BTD, visual_VD, probabilities_BNSL = layer(
                text_BTD,
                visual_VD,
                layout=layout,
                rotation=rotations[layer.attention_type],
                attention_mask=masks[layer.mask_kind],
                **kwargs,
            )
            if wanted["attentions"] and probabilities_BNSL is not None:
                attentions.append(probabilities_BNSL)
        return self.norm(layout.joined(text_BTD, visual_VD)), hidden_states, attentions
