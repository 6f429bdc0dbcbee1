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


def inverse_frequencies(text_config, length, windowed=False):
    """(R / 2,) float64 inverse frequencies of the rotary embedding, for the R numbers of a head that are rotated, and the
    factor its cosines and sines carry. `windowed`: of Gemma 3's layers with a window."""
    rope = dict(text_config.get("rope_parameters") or text_config.get("rope_scaling") or {})
    rope = rope.get("sliding_attention" if windowed else "full_attention", rope)
    theta = rope.get("rope_theta") or text_config.get("rope_theta")
    if windowed and text_config.get("rope_local_base_freq"):
        theta = text_config["rope_local_base_freq"]
    kind = rope.get("rope_type", "default")
    head = _head_size(text_config)
    head = int(head * (rope.get("partial_rotary_factor") or text_config.get("partial_rotary_factor") or 1))
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
    family = text_config["model_type"]
    rotations = {
        windowed: inverse_frequencies(text_config, rope_length or max(positions) + 1, windowed)
        for windowed in (False, family == "gemma3_text")
    }
    gemma = family in ("gemma2", "gemma3_text")
    eps = text_config["rms_norm_eps"]
    N = text_config["num_attention_heads"]
    K = text_config.get("num_key_value_heads") or N
    D, H = text_config["hidden_size"], _head_size(text_config)
    L = text_config["num_hidden_layers"]
    seeing = range(L) if config.visual_layers is None else config.visual_layers
    lm = "model.language_model."
    # what Gemma's and Granite's configs say beside
    scale = (text_config["query_pre_attn_scalar"] if gemma else H) ** -0.5
    scale = text_config["attention_multiplier"] if family == "granite" else scale
    bounded = family == "gemma2" and config.text_config._attn_implementation == "eager"
    residual = text_config["residual_multiplier"] if family == "granite" else 1
    amplified = text_config["embedding_multiplier"] if family == "granite" else math.sqrt(D) if gemma else 1

    def norm(name, x):
        """The norm of that name, or x as it is where the family has none of that name."""
        return _rms_norm(x, w[name] + 1 if gemma else w[name], eps) if name in w else x

    before, behind = "post_attention_layernorm.weight", None
    if gemma:
        before, behind = "pre_feedforward_layernorm.weight", "post_attention_layernorm.weight"
    elif family == "olmo2":
        before, behind = None, "post_attention_layernorm.weight"

    embedding = w[lm + "embed_tokens.weight"]
    # a row for each text position; visual positions never have one
    h = {i: embedding[ids[i]] * amplified for i in text}
    hidden_states, attentions = [_rows(h, len(ids))], []

    for layer in range(L):
        p = f"{lm}layers.{layer}."
        normed = {i: norm(p + "input_layernorm.weight", h[i]) for i in text}
        if layer in seeing and visual:
            q = "model.visual_projector." if config.projector_sharing == "shared" else p + "visual_projector."
            U = F.gelu(_linear(w, q + "linear_1", features.double()))
            U = _linear(w, q + "linear_2", U)
            for i, u in zip(visual, U, strict=True):
                normed[i] = norm(p + "input_layernorm.weight", u)

        window = _window(text_config, layer)
        rotated = text_config.get("no_rope_layers") is None or text_config["no_rope_layers"][layer]
        frequencies, amplitude = rotations[family == "gemma3_text" and window < math.inf]
        if p + "self_attn.qkv_proj.weight" in w:  # Phi-3: one matrix below the other
            names = [p + f"self_attn.{x}_proj.weight" for x in "qkv"]
            w.update(zip(names, w[p + "self_attn.qkv_proj.weight"].split([N * H, K * H, K * H])))

        def heads(which, x, p=p):
            """(N or K, H) queries, keys or values of one token, before they are rotated."""
            y, name = _linear(w, f"{p}self_attn.{which}_proj", x), f"{p}self_attn.{which}_norm.weight"
            return norm(name, y).view(-1, H) if family == "olmo2" else norm(name, y.view(-1, H))

        def turned(x, i, on=rotated, frequencies=frequencies, amplitude=amplitude):
            return _rotate(x, positions[i], frequencies, amplitude) if on else x

        keys = {i: turned(heads("k", x), i) for i, x in normed.items()}
        values = {i: heads("v", x) for i, x in normed.items()}
        attention = torch.zeros(N, len(ids), len(ids), dtype=torch.float64)
        for i in text:
            q = turned(heads("q", normed[i]), i)
            seen = [j for j in sorted(keys) if j <= i and positions[i] - positions[j] < window]
            k = torch.stack([keys[j] for j in seen])  # (seen, K, H)
            v = torch.stack([values[j] for j in seen])
            mixed = []
            for n in range(N):
                group = n // (N // K)
                scores = k[:, group] @ q[n] * scale
                if bounded:
                    scores = (
                        text_config["attn_logit_softcapping"] * (scores / text_config["attn_logit_softcapping"]).tanh()
                    )
                probabilities = torch.softmax(scores, dim=0)
                attention[n, i, seen] = probabilities
                mixed.append(probabilities @ v[:, group])
            attended = _linear(w, p + "self_attn.o_proj", torch.cat(mixed))
            h[i] = h[i] + residual * (norm(p + behind, attended) if behind else attended)
            fed = _feed_forward(w, p, norm(p + before, h[i]) if before else h[i], text_config)
            h[i] = h[i] + residual * norm(p + "post_feedforward_layernorm.weight", fed)
        attentions.append(attention)
        hidden_states.append(_rows(h, len(ids)))

    h = {i: norm(lm + "norm.weight", x) for i, x in h.items()}
    hidden_states[-1] = _rows(h, len(ids))
    head = embedding if config.tie_word_embeddings else w["lm_head.weight"]
    logits = {i: head @ x / text_config.get("logits_scaling", 1) for i, x in h.items()}
    if bound := text_config.get("final_logit_softcapping"):
        logits = {i: bound * (x / bound).tanh() for i, x in logits.items()}
    return DenseOutput(_rows(logits, len(ids)), hidden_states, attentions)


def _feed_forward(w, p, x, text_config):
    """The gated network of the layer whose names begin with `p`, or a mixture of such."""
    if text_config["model_type"] == "mixtral":
        names, router, kinds = p + "block_sparse_moe.experts.{}.", p + "block_sparse_moe.gate", ("w1", "w3", "w2")
    else:
        names, router, kinds = p + "mlp.experts.{}.", p + "mlp.gate", ("gate_proj", "up_proj", "down_proj")

    if p + "mlp.gate_up_proj.weight" in w:  # Phi-3: one matrix below the other
        gate, up = w[p + "mlp.gate_up_proj.weight"].chunk(2)
        w.update({p + "mlp.gate_proj.weight": gate, p + "mlp.up_proj.weight": up})

    def network(prefix):
        gate, up, down = (prefix + kind for kind in kinds)
        opened = _linear(w, gate, x)
        opened = F.gelu(opened, approximate="tanh") if "hidden_activation" in text_config else F.silu(opened)
        return _linear(w, down, opened * _linear(w, up, x))

    if router + ".weight" not in w:
        return network(p + "mlp.")
    shares = torch.softmax(_linear(w, router, x), dim=0)
    chosen = sorted(range(len(shares)), key=lambda e: -shares[e])[: text_config["num_experts_per_tok"]]
    total = sum(shares[e] for e in chosen) if text_config.get("norm_topk_prob", True) else 1
    return sum(shares[e] / total * network(names.format(e)) for e in chosen)


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
    """Rotate (heads, H) vectors, whose first and second halves hold the two coordinates of each plane; where there are
    fewer planes, those of their first numbers."""
    angles = position * frequencies
    cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
    a, b, rest = x.split([len(frequencies), len(frequencies), x.shape[-1] - 2 * len(frequencies)], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
