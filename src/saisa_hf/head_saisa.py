# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What becomes of the last hidden states: a loss in training, the next token in generation.

All logits would be the largest tensor in training: a vocabulary is ten to a hundred times as wide as the hidden states. So
the loss makes those of some labelled rows at a time, and backward computes them again.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from .attention_saisa import behind, hold_text_alone
from .checkpoint_saisa import from_package
from .compat_saisa import CACHE, decoding_masks, one_cache
from .tiles_saisa import visual_inputs
from .vision_saisa import frame_lengths, reduced_length
from .visual_states_saisa import check_one_of


IGNORED = -100
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32; each chunk is one such tensor, its copy in float32 and its gradient
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")  # those of `forward` that are the loss's
# those that images come in
IMAGES = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_sizes", "num_tiles", "frame_pooling")
IMAGES += ("visual_states",)


def chunked_cross_entropy(
    hidden_PD: Tensor,
    targets_P: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """The loss of transformers' causal language models, as a float32 scalar.

    Args:
        hidden_PD: rows that predict, with any number of leading axes.
        targets_P: what each should predict; -100 is ignored, and the head is not applied to these rows.
        head: hidden rows (n, D) -> logits (n, vocab_size). Its weights get their gradients.
        vocab_size: width of the logits.
        num_items_in_batch: what the sum is divided by; None is the number of targets.
        logits_at_once: most logits, rows times `vocab_size`, that exist at a time.
    """
    hidden_PD, targets_P = hidden_PD.flatten(0, -2), targets_P.flatten().to(hidden_PD.device)
    rows = (targets_P != IGNORED).nonzero().flatten()
    hidden_RD, targets_R = hidden_PD.index_select(0, rows), targets_P.index_select(0, rows)

    def chunk_loss(hidden_ND, targets_N):
        return nn.functional.cross_entropy(head(hidden_ND).float(), targets_N, reduction="sum")

    size = max(1, logits_at_once // vocab_size)
    # with nothing to learn from the loss is zero, and still reaches the weights: processes that train together expect it
    total = 0.0 if len(rows) else head(hidden_PD[:1]).float().sum() * 0.0
    keep_graph = torch.is_grad_enabled()
    for chunk in zip(hidden_RD.split(size), targets_R.split(size)):
        total = total + (checkpoint(chunk_loss, *chunk, use_reentrant=False) if keep_graph else chunk_loss(*chunk))
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        return total / count.to(total.device).clamp(min=1)
    return total.float() / max(count, 1)


class SaisaHead(nn.Linear):
    """The language model's head. A loss that makes its logits some rows at a time is computed in one call of this module:
    processes that share its weights gather them for each call, but have unlike numbers of rows."""

    def forward(self, hidden_BTD: Tensor, loss: Callable | None = None) -> Tensor:
        """Logits (B, T, vocabulary), or what `loss` makes of the hidden rows and the map from some of them to logits."""
        return super().forward(hidden_BTD) if loss is None else loss(hidden_BTD, super().forward)


def targets_of(labels_BS, shift_labels_BS, shape: tuple[int, int], ignored: int) -> Tensor | None:
    """(B, S) what each position is to predict; None without labels. Raises ValueError if these do not have the `shape`."""
    if labels_BS is None:
        return None
    for name, given in (("labels", labels_BS), ("shift_labels", shift_labels_BS)):
        if given is not None and tuple(given.shape) != tuple(shape):
            raise ValueError(f"{name} is {tuple(given.shape)}: expected {tuple(shape)}, one for each input token.")
    return nn.functional.pad(labels_BS, (0, 1), value=ignored)[:, 1:] if shift_labels_BS is None else shift_labels_BS


class SuppressImageToken:
    """A logits processor: the image token is never written."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor) -> Tensor:
        is_image = torch.arange(scores.shape[-1], device=scores.device) == self.image_token_id
        return scores.masked_fill(is_image, -float("inf"))


class AnswersAboutImages:
    """Makes logits, losses and answers of `SaisaForConditionalGeneration`, in front of transformers' `GenerationMixin`."""

    compiled_prefill = None  # what `compile_prefill` made

    def __call__(self, *args, **kwargs):
        """`forward`, or a compiled prefill where that can take its place."""
        can_be = self.compiled_prefill is not None and not args and not torch.compiler.is_compiling()
        output = self.compiled_prefill(self, kwargs) if can_be else None
        return super().__call__(*args, **kwargs) if output is None else output

    def compile_prefill(self, text_lengths=None, visual_lengths=None, **options) -> None:
        """From here on, prompts are read in one graph of `torch.compile`, made once for each bucket of lengths; undone by
        `model.compiled_prefill = None`. Needs the package saisa_hf.

        Args:
            text_lengths, visual_lengths: the numbers that prompts are padded to: of text tokens, in the sample that has most,
                and of visual tokens, in the batch. None: in each octave two of text, eight of visual tokens.
            options: of `torch.compile`: `mode="reduce-overhead"` for CUDA graphs.

        Raises:
            ValueError: lengths are not positive integers.
        """
        compiled = from_package("compile_prefill", "common.prefill", "CompiledPrefill")
        self.compiled_prefill = compiled(text_lengths, visual_lengths, **options)

    def logits_and_loss(self, hidden_BTD, targets_BT, skip_logits: bool, labels, loss_arguments: dict, kwargs: dict):
        """(B, T, vocabulary) logits, or None where they are skipped, and the loss, or None without targets."""
        scaled, vocab_size = self.language_model.family.scaled_logits, self.config.text_config.vocab_size
        count, ignored = loss_arguments.get("num_items_in_batch"), loss_arguments.get("ignore_index", IGNORED)
        if skip_logits and targets_BT is not None:
            targets_BT = targets_BT.masked_fill(targets_BT == ignored, IGNORED)

            def loss(hidden_BTD, head):
                return chunked_cross_entropy(hidden_BTD, targets_BT, lambda x: scaled(head(x)), vocab_size, count)

            # a head that was put in its place, adapters for instance, knows nothing of losses
            is_own = isinstance(self.lm_head, SaisaHead)
            return None, self.lm_head(hidden_BTD, loss) if is_own else loss(hidden_BTD, self.lm_head)
        # in strides that make it one product: PyTorch would read the head, or copy it, for each sample of a slice
        hidden_BTD = hidden_BTD.flatten(0, 1).contiguous().unflatten(0, hidden_BTD.shape[:2])
        logits_BTX = scaled(self.lm_head(hidden_BTD))
        if targets_BT is None:
            return logits_BTX, None
        count = (targets_BT != ignored).sum() if count is None else torch.as_tensor(count)
        # at least one, and no mean: where no label counts, the loss is zero, not NaN
        loss_arguments |= {**kwargs, "shift_labels": targets_BT, "num_items_in_batch": count.clamp(min=1)}
        return logits_BTX, self.loss_function(logits=logits_BTX, labels=labels, vocab_size=vocab_size, **loss_arguments)

    vision_tower = property(lambda self: self.model.vision_tower)
    language_model = property(lambda self: self.model.language_model)
    fold_projectors = property(lambda self: self.model.fold_projectors)
    unfold_projectors = property(lambda self: self.model.unfold_projectors)

    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """See `SaisaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_visual_states(self, pixel_values: Tensor, store: str | None = None, **kwargs):
        """See `SaisaModel.get_visual_states`."""
        return self.model.get_visual_states(pixel_values, store, **kwargs)

    def keep(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None, **images):
        """What stands in front of questions, read once: a `saisa_hf.SaisaBeginning`, which `generate` and `forward` take as
        their cache. Arguments as in `forward`. Raises ValueError unless `input_ids` is one row."""
        return from_package("Keeping a beginning", "common.beginnings", "keep")(self, input_ids, attention_mask, images)

    def new_cache(self, beginning=None):
        """A cache that holds all keys, so that it can be cropped anywhere: an empty one, or behind a `SaisaBeginning`."""
        return behind(beginning or hold_text_alone(DynamicCache(), self.language_model.layers), self.model)

    def unshare_projectors(self) -> None:
        """See `SaisaModel.unshare_projectors`."""
        self.model.unshare_projectors()

    create_masks_for_generate = staticmethod(decoding_masks)

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' own, but it never writes the image token, and reads a prompt with images at once, not in chunks."""
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if hasattr(cache, "keys_values"):  # a `SaisaBeginning`
            return cache.generate(self, inputs, generation_config, logits_processor, *args, **kwargs)
        if cache is not None:
            kwargs[CACHE] = cache
        if "tokenizer" in kwargs:  # `transformers serve` hands over the processor, which cannot look for stop strings
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        pixel_values, visual_states = kwargs.get("pixel_values"), kwargs.get("visual_states")
        check_one_of(pixel_values, visual_states)
        given = next((x for x in (inputs, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None), None)
        has_images = pixel_values is not None or visual_states is not None
        if has_images and given is None:
            raise ValueError("Expected input_ids or inputs_embeds with placeholders for the images: got images alone.")
        if not has_images and given is not None and not given.is_floating_point():  # they may be in the cache
            has_images = bool((given == self.config.image_token_id).any())
        if has_images:
            logits_processor = [*(logits_processor or []), SuppressImageToken(self.config.image_token_id)]
            kwargs["prefill_chunk_size"] = None
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """transformers' own, and the images whose placeholders are among the tokens that are not in the cache yet. Raises
        ValueError if a prompt ends in a visual token, from which nothing can be predicted outside embedding space."""
        images, cache = _images_of(kwargs), one_cache(past_key_values, cache)
        kwargs |= {CACHE: cache, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "pixel_values" not in images and "visual_states" not in images:
            return model_inputs
        new_ids, new_embeds = model_inputs.get("input_ids"), model_inputs.get("inputs_embeds")
        length = (new_ids if new_embeds is None else new_embeds).shape[1]
        is_step = length == 1 and cache is not None and input_ids.shape[1] > 1
        # in embedding space a prompt may end in an image, which may be of one token
        if is_step and not (self.config.in_embedding_space and (input_ids[:, -1] == self.config.image_token_id).any()):
            return model_inputs
        visual_BS = self.model.get_placeholder_mask(new_ids, new_embeds)
        if not visual_BS.any():
            return model_inputs
        if not self.config.in_embedding_space:
            _check_last_token(visual_BS, attention_mask)
        all_BS = visual_BS if new_embeds is not None else self.model.get_placeholder_mask(input_ids)
        new_B, all_B = visual_BS.sum(1).tolist(), all_BS.sum(1).tolist()
        tokens = self._visual_tokens(images, sum(new_B), sum(all_B))
        if sum(tokens) == sum(all_B) != sum(new_B):  # the images of the whole conversation, of which some are cached
            wanted = _last_images(images_by_row(all_B, tokens), tokens, new_B)
            images = {name: value[wanted] for name, value in images.items()}
        return {**model_inputs, **images}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """transformers' own, but each row's images stay together, as rows may have different numbers of them."""
        images = _images_of(kwargs)
        if images and expand_size > 1:
            all_BS = self.model.get_placeholder_mask(input_ids, kwargs.get("inputs_embeds"))
            cache = one_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
            cached = 0 if cache is None else int(cache.get_seq_length())
            new_B, all_B = all_BS[:, cached:].sum(1).tolist(), all_BS.sum(1).tolist()
            tokens = self._visual_tokens(images, sum(new_B), sum(all_B))
            are_all = sum(tokens) == sum(all_B)  # else they are those of the new turn
            if not are_all:
                name = "visual_states" if "visual_states" in images else "pixel_values"
                self.model.check_visual_tokens(name, tokens, sum(new_B))
            rows = images_by_row(all_B if are_all else new_B, tokens)
            order = [image for row in rows for _ in range(expand_size) for image in row]
            if "pixel_values" in images and order:  # an image is encoded once for all sequences of its row
                images = {"visual_states": self.model.get_visual_states(**images)}
            images = {name: value[order] for name, value in images.items()}
        kwargs |= {"expand_size": expand_size, "is_encoder_decoder": is_encoder_decoder, "input_ids": input_ids}
        input_ids, kwargs = super()._expand_inputs_for_generation(**kwargs)
        return input_ids, {**kwargs, **images}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """transformers' own; layers that do not see the image hold text alone in a dynamic cache that it makes."""
        given = one_cache(model_kwargs.get("past_key_values"), model_kwargs.get("cache"))
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None:
            hold_text_alone(model_kwargs.get(CACHE), self.language_model.layers)

    def generate_batch(self, inputs, *args, **kwargs):
        """transformers' own continuous batching, which is for text: it has no place for images. Raises ValueError if a
        prompt holds the image token."""
        token = self.config.image_token_id
        for index, ids in enumerate(inputs):
            if token in torch.as_tensor(ids).flatten().tolist():
                raise ValueError(f"inputs[{index}] holds the image token ({token}). Use generate for images.")
        return super().generate_batch(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        """transformers' own; a draft model that takes no images does not get them."""
        draft, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if draft is not None and given is not None:
            known = inspect.signature(draft.forward).parameters
            kwargs["model_kwargs"] = {name: x for name, x in given.items() if name in known or name not in IMAGES}
        return super()._get_candidate_generator(*args, **kwargs)

    def _visual_tokens(self, images: dict, *placeholders: int) -> list[int]:
        """How many visual tokens each image has; if the encoder does not tell, the `placeholders` that they may fill do."""
        if "visual_states" in images:
            return images["visual_states"].lengths
        if "frame_pooling" in images and images["pixel_values"].ndim != 5:
            poolings = images["frame_pooling"].tolist()
            images = {name: x for name, x in images.items() if name != "frame_pooling"}
            tokens, kind = self._visual_tokens(images, *placeholders), self.config.visual_token_reduction
            sizes = [images["pixel_values"].shape[-2:]] * len(tokens)
            return frame_lengths(kind, tokens, poolings, sizes, images.get("spatial_shapes"))
        if "spatial_shapes" in images:
            kind, count = self.config.visual_token_reduction, self.config.reduced_visual_tokens
            return [reduced_length(kind, count, h * w, (h, w)) for h, w in images["spatial_shapes"].tolist()]
        count, size = len(images["pixel_values"]), tuple(getattr(images["pixel_values"], "shape", ())[2:])
        if len(size) == 3:
            tokens = self.config.visual_tokens_of(*size[1:]) or self.config.image_seq_length
            tiles = images.get("image_sizes"), images.get("num_tiles"), images.get("frame_pooling")
            return [one.length for one in visual_inputs(self.config, tokens, size[1:], *tiles)]
        each = self.config.visual_tokens_of(*size) if len(size) == 2 else None
        if each is None:
            each = self.config.image_seq_length
            if count and count * each not in placeholders and placeholders[-1] % count == 0:
                each = placeholders[-1] // count
        return [each] * count


def _images_of(kwargs: dict) -> dict:
    """Those of `IMAGES` that are given; they are taken out of `kwargs`."""
    return {name: value for name in IMAGES if (value := kwargs.pop(name, None)) is not None}


def _check_last_token(visual_BS: Tensor, attention_mask) -> None:
    """Raises ValueError if the last real token of a sample is visual."""
    real_BS = torch.ones_like(visual_BS)
    if attention_mask is not None and attention_mask.ndim == 2:  # on another device, where transformers moved the ids
        real_BS = attention_mask[:, -visual_BS.shape[1] :].bool().to(visual_BS.device)
    last_B1 = real_BS.cumsum(1).argmax(1, keepdim=True)  # the first of the largest counts
    if visual_BS.gather(1, last_B1).any():
        raise ValueError("A prompt ends in an image, but visual tokens predict nothing: put a text token behind it.")


def images_by_row(placeholders_B: list[int], tokens: list[int]) -> list[list[int]]:
    """The indices of the images that belong to each row, whose placeholders take them up in order."""
    rows, image = [], 0
    for placeholders in placeholders_B:
        first = image
        while placeholders > 0 and image < len(tokens):
            placeholders -= tokens[image]
            image += 1
        rows.append(list(range(first, image)))
    return rows


def _last_images(rows: list[list[int]], tokens: list[int], new_B: list[int]) -> list[int]:
    """Of each row's images the last ones, which fill its `new` placeholders."""
    fitting = [images_by_row([new], [tokens[image] for image in reversed(row)])[0] for row, new in zip(rows, new_B)]
    return [image for row, last in zip(rows, fitting) for image in row[len(row) - len(last) :]]
