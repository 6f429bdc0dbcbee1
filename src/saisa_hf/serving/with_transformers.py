# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' own server, made fit for strangers.

transformers' handlers read the images of a request, and tokenize its text, on the event loop: while one address is slow,
nobody is answered. Here each handler is called twice. The first time, a stand-in for the processor notes what the handler
asks of it, and ends the call; that is then done in a thread. The second time, the stand-in hands over the result. So
nothing of transformers' code has to be repeated here, and what goes wrong before the second call is the request's fault.
"""

import asyncio
import copy
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..common.extras import needs
from ..compat_saisa import TESTED_RELEASES, VERSION
from ..image_sources_saisa import LIMITS, ImageLimits, read_url
from ..processing_saisa import pop_call_arguments
from .guard import BadRequest, Guard, blamed_on_the_request, error_body
from .run import ServeOptions


SERVERS = "transformers.cli.serving.server"
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
PARTS = ("text", "input_text", "output_text", "image_url", "input_image")
# variables of a chat template that the processor would take for arguments of its own, beside those of `pop_call_arguments`
TAKEN = {"chat_template", "images", "visual_states", "tokenize", "return_dict", "return_assistant_tokens_mask", *LIMITS}
MOST_STOPS, LONGEST_STOP = 4, 200  # as OpenAI has it; each is compared with the whole vocabulary
FETCHING = ThreadPoolExecutor(32, "image from an address")  # they wait most of the time
AT_ONCE = 4  # addresses of a request; the others' turns come while these are slow
DECODING = ThreadPoolExecutor(2, "images of a request")  # each may need the memory of all images of a request
SHARED = 4  # the images of a request may have so many times the pixels of the largest image
CHARACTERS = 64  # of a token, at most: what is longer than the context for certain is not tokenized


def start(options: ServeOptions) -> None:
    """Serves until the process is stopped."""
    if options.further:
        given = " ".join(options.further)
        raise ValueError(f"{given!r:.80} behind -- is for vLLM, but the backend is transformers.")
    for module in ("fastapi", "uvicorn", "openai"):
        needs(module, "saisa serve", package="transformers[serving]", extra="serve")
    if VERSION < (5, 6):
        raise ImportError(
            f"saisa serve needs transformers 5.6 or later ({TESTED_RELEASES} were tested): pip install 'transformers>=5.6'"
        )
    ImageLimits.of_process()  # a limit that is none is named now
    server: Any = importlib.import_module(SERVERS)
    command: Any = importlib.import_module("transformers.cli.serve").Serve
    build = server.build_server

    def build_guarded(*args: Any, **kwargs: Any) -> Any:
        for handler in (*args, *kwargs.values()):
            if hasattr(handler, "handle_request"):
                handler.handle_request = _Ahead(handler, options).handle_request
        return _guarded(build(*args, **kwargs), options)

    server.build_server = build_guarded
    names = ("host", "port", "device", "dtype", "attn_implementation")
    command(options.checkpoint, **{name: getattr(options, name) for name in names})


def _guarded(app: Any, options: ServeOptions) -> Any:
    """`app` behind a `Guard`, with errors in OpenAI's form."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(status: int, message: object) -> JSONResponse:
        return JSONResponse(error_body(status, str(message)[:1000]), status_code=status)

    @app.exception_handler(BadRequest)
    async def bad_request(_request, error):
        return answer(400, error)

    @app.exception_handler(RequestValidationError)
    async def no_json_object(_request, _error):
        return answer(400, "The request's body is no JSON object.")

    @app.exception_handler(HTTPException)
    async def of_transformers(_request, error):
        return answer(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def unforeseen(_request, error):
        return answer(500, f"{type(error).__name__} in the server; its log says more.")

    app.add_middleware(Guard, max_request_bytes=options.max_request_bytes, max_requests=options.max_requests)
    return app


class _Noted(BaseException):
    """What a handler asks of the processor. No Exception, so that no handler takes it for one of its own."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args_asked, self.kwargs_asked = args, kwargs


class _Ahead:
    """A handler of transformers' server whose images are read, and whose texts are tokenized, in threads."""

    def __init__(self, handler: Any, options: ServeOptions):
        self.handler, self.options = handler, options

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """As transformers' `handle_request`. Raises BadRequest where the request is to blame."""
        with blamed_on_the_request(*MALFORMED, RuntimeError):
            _check(body)
            model_id, model, processor = self.handler._resolve_model(body)
            # a temperature that is no number, a seed that is too large ...
            generation = self.handler._build_generation_config(dict(body), model.generation_config)
        with blamed_on_the_request(*MALFORMED):
            noted = await self._call(self._with(model_id, model, processor, _note), dict(body), request_id)
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62
            inputs = await self._done(processor, noted, context)
            _check_length(inputs["input_ids"].shape[-1], generation.max_new_tokens, body, context)
        handler = self._with(model_id, model, processor, lambda *args, **kwargs: inputs)
        with blamed_on_the_request(ValueError):  # of `generate`: settings that do not go together
            return await type(handler).handle_request(handler, body, request_id)

    def _with(self, model_id: str, model: Any, processor: Any, apply_chat_template: Any) -> Any:
        """The handler, with a processor that does what is said instead."""
        handler, stand_in = copy.copy(self.handler), copy.copy(processor)
        stand_in.apply_chat_template = apply_chat_template
        handler._resolve_model = lambda body: (model_id, model, stand_in)
        return handler

    async def _call(self, handler: Any, body: dict, request_id: str) -> _Noted:
        try:
            await type(handler).handle_request(handler, body, request_id)
        except _Noted as noted:
            return noted
        raise BadRequest("the request has no messages")

    async def _done(self, processor: Any, noted: _Noted, context: int) -> Any:
        """What the processor makes of what the handler asked for."""
        (messages,), arguments = noted.args_asked, noted.kwargs_asked
        parts = [part for message in messages for part in message["content"]]
        images = [part for part in parts if part["type"] == "image"]
        if len(images) > self.options.max_images:
            raise BadRequest(f"{len(images)} images, more than max_images={self.options.max_images}.")
        if (length := sum(len(part.get("text", "")) for part in parts)) > CHARACTERS * context:
            raise BadRequest(f"{length} characters are more than the model's context of {context} tokens.")
        loop, limits, most = asyncio.get_running_loop(), ImageLimits.of_process(), self.options.max_request_bytes
        turns = asyncio.Semaphore(AT_ONCE)

        async def fetch(index: int, part: dict) -> None:
            url = part["url"]
            if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")):
                try:
                    async with turns:
                        found = await loop.run_in_executor(FETCHING, read_url, url, limits)
                except Exception as error:
                    what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                    raise BadRequest(f"image {index} ({url:.120}) cannot be read: {what:.300}") from error
                part["image"] = found.getvalue()
                del part["url"]
                if sum(len(one.get("image", b"")) for one in images) > most:
                    raise BadRequest(f"the images at its addresses have more than max_request_bytes={most} bytes.")

        await asyncio.gather(*(fetch(index, part) for index, part in enumerate(images)))
        if images:
            arguments["max_image_pixels"] = limits.max_image_pixels * min(1, SHARED / len(images))
        pool = DECODING if images else None  # None: other threads for texts, which no image holds up
        return await loop.run_in_executor(pool, lambda: processor.apply_chat_template(messages, **arguments))


def _note(*args: Any, **kwargs: Any) -> None:
    raise _Noted(args, kwargs)


def _check(body: dict) -> None:
    """Raises BadRequest for what transformers' server would leave out in silence, or hand to the processor."""
    variables = body.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise BadRequest(f"chat_template_kwargs is {variables!r:.80}. Expected an object.")
    pop_call_arguments(others := dict(variables))
    if wrong := sorted(variables.keys() & TAKEN | variables.keys() - others.keys()):
        raise BadRequest(f"chat_template_kwargs has {', '.join(wrong)}: only variables of the template are taken.")
    if body.get("generation_config") is not None:
        raise BadRequest("generation_config is not taken. There are temperature, top_p, max_tokens, stop and seed.")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    fits = isinstance(stops, list) and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops)
    if not fits or len(stops) > MOST_STOPS or stops == stop == []:
        most = f"{MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
        raise BadRequest(f"stop is {stop!r:.80}. Expected a string, or a list of up to {most}.")
    items = body.get("messages", body.get("input"))
    for message in items if isinstance(items, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in [message] if isinstance(message, dict) and "role" not in message else content or []:
            if isinstance(part, dict) and part.get("type") not in (
                *PARTS,
                "function_call",
                "function_call_output",
                "reasoning",
            ):
                raise BadRequest(
                    f"part {str(part)[:80]} of a message: the model takes text and images ({', '.join(PARTS)})."
                )


def _check_length(prompt: int, answer: int, body: dict, context: int) -> None:
    """Raises BadRequest if the prompt and the answer that was asked for are longer than the model's context."""
    if all(body.get(name) is None for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")):
        answer = 1  # nothing was asked for
    if answer < 1:
        raise BadRequest(f"an answer of {answer} tokens was asked for. Expected 1 or more.")
    if prompt + answer > context:
        raise BadRequest(f"{prompt} tokens and an answer of {answer} are more than the model's context of {context}.")
