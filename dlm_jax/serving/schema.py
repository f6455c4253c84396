# SPDX-License-Identifier: Apache-2.0
"""What a request may hold: JSON schemas, which also make the OpenAPI document."""

from typing import Any

from jsonschema import Draft202012Validator, exceptions

from dlm_jax.diffusion.samplers import SOLVERS
from dlm_jax.errors import UserError
from dlm_jax.types import Real

MAX_TEXTS = 32  # rows of one request
MAX_STEPS = 256
MAX_CHARACTERS = 4000

_TEXT = {"type": "string", "maxLength": MAX_CHARACTERS}
_WORD = {"type": "string", "maxLength": 200}
_WORDS = {"type": "array", "items": _WORD, "maxItems": 64}
_RECORD = {"type": "object", "additionalProperties": _WORD, "maxProperties": 32}
_SOURCES = {
    "type": "array",
    "items": {"anyOf": [_TEXT, _RECORD]},
    "minItems": 1,
    "maxItems": MAX_TEXTS,
}


def _number(description: str, **limits: Real) -> dict:
    return {"type": "number", "description": description, **limits}


def _integer(description: str, minimum: int, maximum: int) -> dict:
    limits = {"minimum": minimum, "maximum": maximum}
    return {"type": "integer", "description": description, **limits}


SAMPLING = {
    "n": _integer("texts, or texts per source", 1, MAX_TEXTS),
    "seed": _integer("text i depends only on the seed and i", 0, 2**53),
    "num_steps": _integer("calls of the network", 1, MAX_STEPS),
    "solver": {"enum": list(SOLVERS)},
    "clamp": _number(
        "the clamp acts at times up to this; -1: off", minimum=-1, maximum=1
    ),
    "temperature": _number("of ancestral and ddim", exclusiveMinimum=0, maximum=10),
    "eta": _number("of ddim: 0 adds no noise", minimum=0, maximum=1),
    "template": _TEXT | {"description": "___ is a word, [...] one or more"},
    "length": _integer("words, or pieces, of the text", 1, 4096),
    "contains": {"anyOf": [_WORD, _WORDS], "description": "phrases that must occur"},
    "lacks": {"anyOf": [_WORD, _WORDS], "description": "words that must not occur"},
}
CONTROL = {
    "semantic": _RECORD | {"description": "fields and their values"},
    "pos": _WORDS | {"description": "a tag per word; needs a classifier"},
}
TARGETS = {
    "sources": _SOURCES | {"description": "texts, or records {field: value}"},
    "cfg_weight": _number("of classifier-free guidance", minimum=0, maximum=20),
}
TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_TEXTS}


def _object(properties: dict, *required: str) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


MBR = {"mbr": _integer("candidates of each target", 1, MAX_TEXTS)}
REQUESTS = {
    "sample": _object(SAMPLING | CONTROL),
    "translate": _object(SAMPLING | TARGETS | MBR, "sources"),
    "stream": _object(SAMPLING | CONTROL | TARGETS),
    "nll": _object({"texts": TEXTS, "sources": _SOURCES}, "texts"),
}
_SUMMARY = {
    "sample": "Generates texts, under constraints if there are any.",
    "translate": "Generates the target of each source.",
    "stream": "Generates as sample or translate; a server-sent event for each step.",
    "nll": "Estimates the bound on -log p of texts, in nats, with the share of each token.",
}


def check(name: str, body: Any) -> dict:
    """Returns the body of a request of this name. Raises UserError with the first fault."""
    error = exceptions.best_match(
        Draft202012Validator(REQUESTS[name]).iter_errors(body)
    )
    if error is None:
        return body
    place = ".".join(map(str, error.absolute_path)) or "request"
    raise UserError(f"{place}: {error.message[-200:]}")  # it begins with the value


def openapi() -> dict:
    """Returns the OpenAPI document of the API."""
    paths: dict[str, Any] = {
        "/v1/model": {"get": _operation("The model and its settings.")}
    }
    for name, summary in _SUMMARY.items():
        content = {"application/json": {"schema": REQUESTS[name]}}
        body = {"required": True, "content": content}
        paths[f"/v1/{name}"] = {"post": {**_operation(summary), "requestBody": body}}
    info = {"title": "dlm_jax", "version": "1"}  # of the API
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _operation(summary: str) -> dict:
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer"},
            "400": {"description": "a fault of the request, as {error}"},
            "503": {"description": "too many requests wait; try again"},
        },
    }
