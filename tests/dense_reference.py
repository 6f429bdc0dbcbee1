"""SAISA's language part written out densely in float64, from the description of the computation alone.

One sequence at a time, one query row at a time. It shares no code with the package and none with transformers, so what
the two agree on is the architecture, not an implementation.

Letters: S sequence in input order, D hidden size, N query heads, K key/value heads, H head size, C encoder width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class DenseOutput:
    """`logits` (S, vocab); `hidden_states`: L + 1 tensors (S, D), the last one normalised; `attentions`: L tensors
    (N, S, S) of probabilities. Rows at visual positions are zero."""

    logits: torch.Tensor
    hidden_states: list
    attentions: list


def inverse_frequencies(text_config, length):
    """(H / 2,) float64 inverse frequencies of the rotary embedding, and the factor its cosines and sines carry."""
    rope = dict(text_config.get("rope_parameters") or text_config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or text_config.get("rope_theta")
    kind = rope.get("rope_type", "default")
    head = _head_size(text_config)
    trained = text_config["max_position_embeddings"]
    if kind == "dynamic":
        stretch = rope["factor"] * max(length, trained) / trained - (rope["factor"] - 1)
        theta = theta * stretch ** (head / (head - 2))
    plain = torch.tensor([theta ** (-2 * j / head) for j in range(head // 2)], dtype=torch.float64)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # how often a frequency turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (smooth + (1 - smooth) / factor), 1.0
    if kind == "yarn":

        def dimension(rotations):
            return head * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(dimension(32)), 0)
        last = min(math.ceil(dimension(1)), head - 1)
        ramp = ((torch.arange(head // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
        return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1
    raise NotImplementedError(kind)


def dense_saisa(state_dict, config, input_ids, features=None, positions=None, rope_length=None):
    """Compute the language part of a SAISA model for one unpadded sequence.

    Args:
        state_dict: parameters under the names of `SaisaForConditionalGeneration`, any dtype.
        config: its `SaisaConfig`.
        input_ids: (S,) integers with `config.image_token_id` at the visual positions.
        features: (number of visual tokens, C) encoder features in the order of the placeholders; None without images.
        positions: (S,) positions for the rotary embedding and the sliding window; None counts from 0.
        rope_length: the length a dynamically scaled rotary embedding adapts to; None means the last position + 1.

    Returns:
        `DenseOutput` in float64.
    """
    text_config = config.text_config.to_dict()
    w = {name: value.detach().double() for name, value in state_dict.items()}
    ids = input_ids.tolist()
    visual = [i for i, token in enumerate(ids) if token == config.image_token_id]
    text = [i for i, token in enumerate(ids) if token != config.image_token_id]
    positions = list(range(len(ids))) if positions is None else positions.tolist()
    frequencies, amplitude = inverse_frequencies(text_config, rope_length or max(positions) + 1)
    eps = text_config["rms_norm_eps"]
    N = text_config["num_attention_heads"]
    K = text_config.get("num_key_value_heads") or N
    H = _head_size(text_config)
    L = text_config["num_hidden_layers"]
    seeing = range(L) if config.visual_layers is None else config.visual_layers
    lm = "model.language_model."

    embedding = w[lm + "embed_tokens.weight"]
    h = {i: embedding[ids[i]] for i in text}  # a row for each text position; visual positions never have one
    hidden_states, attentions = [_rows(h, len(ids))], []

    for layer in range(L):
        p = f"{lm}layers.{layer}."
        normed = {i: _rms_norm(h[i], w[p + "input_layernorm.weight"], eps) for i in text}
        if layer in seeing and visual:
            q = "model.visual_projector." if config.projector_sharing == "shared" else p + "visual_projector."
            U = F.gelu(_linear(w, q + "linear_1", features.double()))
            U = _linear(w, q + "linear_2", U)
            for i, u in zip(visual, U, strict=True):
                normed[i] = _rms_norm(u, w[p + "input_layernorm.weight"], eps)

        keys, values = {}, {}
        for i, x in normed.items():
            k = _linear(w, p + "self_attn.k_proj", x).view(K, H)
            if p + "self_attn.k_norm.weight" in w:
                k = _rms_norm(k, w[p + "self_attn.k_norm.weight"], eps)
            keys[i] = _rotate(k, positions[i], frequencies, amplitude)
            values[i] = _linear(w, p + "self_attn.v_proj", x).view(K, H)

        window = _window(text_config, layer)
        attention = torch.zeros(N, len(ids), len(ids), dtype=torch.float64)
        for i in text:
            q = _linear(w, p + "self_attn.q_proj", normed[i]).view(N, H)
            if p + "self_attn.q_norm.weight" in w:
                q = _rms_norm(q, w[p + "self_attn.q_norm.weight"], eps)
            q = _rotate(q, positions[i], frequencies, amplitude)
            seen = [j for j in sorted(keys) if j <= i and positions[i] - positions[j] < window]
            k = torch.stack([keys[j] for j in seen])  # (seen, K, H)
            v = torch.stack([values[j] for j in seen])
            mixed = []
            for n in range(N):
                group = n // (N // K)
                probabilities = torch.softmax(k[:, group] @ q[n] / math.sqrt(H), dim=0)
                attention[n, i, seen] = probabilities
                mixed.append(probabilities @ v[:, group])
            h[i] = h[i] + _linear(w, p + "self_attn.o_proj", torch.cat(mixed))
            x = _rms_norm(h[i], w[p + "post_attention_layernorm.weight"], eps)
            gated = F.silu(_linear(w, p + "mlp.gate_proj", x)) * _linear(w, p + "mlp.up_proj", x)
            h[i] = h[i] + _linear(w, p + "mlp.down_proj", gated)
        attentions.append(attention)
        hidden_states.append(_rows(h, len(ids)))

    h = {i: _rms_norm(x, w[lm + "norm.weight"], eps) for i, x in h.items()}
    hidden_states[-1] = _rows(h, len(ids))
    head = embedding if config.tie_word_embeddings else w["lm_head.weight"]
    return DenseOutput(_rows({i: head @ x for i, x in h.items()}, len(ids)), hidden_states, attentions)


def _head_size(text_config):
    return text_config.get("head_dim") or text_config["hidden_size"] // text_config["num_attention_heads"]


def _window(text_config, layer):
    kinds = text_config.get("layer_types")
    if kinds is not None and kinds[layer] != "sliding_attention":
        return math.inf
    return text_config.get("sliding_window") or math.inf


def _rows(by_position, length):
    rows = torch.zeros(length, next(iter(by_position.values())).shape[0], dtype=torch.float64)
    for i, x in by_position.items():
        rows[i] = x
    return rows


def _linear(w, name, x):
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def _rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _rotate(x, position, frequencies, amplitude):
    """Rotate (heads, H) vectors, whose first and second halves hold the two coordinates of each plane."""
    angles = position * frequencies
    cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
