"""Settings made wrong in many ways, one at a time: what the fuzzers of configurations and processors share."""

import copy
import math

from hostile import unclear


VALUES = {
    "deleted": lambda old: None,
    "None": lambda old: None,
    "zero": lambda old: 0,
    "one": lambda old: 1,
    "minus one": lambda old: -1,
    "odd": lambda old: 7,
    "half": lambda old: 0.5,
    "nan": lambda old: math.nan,
    "inf": lambda old: math.inf,
    "huge": lambda old: 10**9,
    "huger": lambda old: 10**20,
    "long": lambda old: 10**400,
    "true": lambda old: True,
    "false": lambda old: False,
    "text": lambda old: "abc",
    "number as text": lambda old: str(old),
    "empty": lambda old: [],
    "dict": lambda old: {"a": 1},
    "listed": lambda old: [old],
    "twice": lambda old: [old, old],
    "nested": lambda old: [[old], {"b": [None]}],
    "negative": lambda old: -old if isinstance(old, (int, float)) else [-1],
    "shortened": lambda old: old[:-1] if isinstance(old, list) else [None],
    "lengthened": lambda old: old + old if isinstance(old, list) else ["abc"],
}
# one setting under several names; and those that others are computed from
ALSO_NAMED = {"rope_theta": "rope", "rope_scaling": "rope", "rope_parameters": "rope", "rope_local_base_freq": "rope"}
ALSO_NAMED |= {"partial_rotary_factor": "rope", "num_experts": "num_local_experts"}


def malformed(whole: dict, path: tuple, kind: str) -> dict:
    whole = copy.deepcopy(whole)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if kind == "deleted":
        del inner[path[-1]]
    else:
        inner[path[-1]] = VALUES[kind](inner[path[-1]])
    return whole


def wrong_among(cases):
    fields = {name: path for name, _, path in cases}

    def names(name, error):
        path, message = fields[name], str(error)
        return any(key in message or ALSO_NAMED.get(key, key) in message for key in path[-1:])

    return unclear([(name, call) for name, call, _ in cases], names=names, seconds=30, megabytes=800)
