"""What a search may vary: config fields with a range each, read from text, checked, and drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.config import RunConfig, apply_overrides
from orchestrator.errors import ConfigError

__all__ = ["Range", "draw", "parse_search"]

FORM = re.compile(r"(?P<kind>loguniform|uniform|randint|choice)\((?P<body>[^()]+)\)")
BATCHES = ("recipe.batch", "layout.global_batch")
"""Fields whose values the workers share; the first is the batch of a run unless the second is set."""
EXAMPLES = "loguniform(1e-4,1e-1), uniform(0,0.3), randint(16,256) or choice(sgd,adamw)"


@dataclass(frozen=True)
class Range:
    """The values a field may take: between ``values[0]`` and ``values[1]``, or, for a choice, any of ``values``."""

    field: str
    kind: Literal["loguniform", "uniform", "randint", "choice"]
    values: tuple[str, ...]
    step: int = 1
    """Of integers, those that are multiples of it are drawn: batches that a run's workers can share."""

    def at(self, share: float) -> str:
        """Return the value that lies ``share`` of the way along, from 0 to below 1, as ``--set`` takes it.

        The way is even on the range's scale, logarithmic or linear, or over the choices.
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.bounds
        if self.kind == "randint":
            return str(self.integers[int(share * len(self.integers))])
        if self.kind == "loguniform":
            return f"{math.exp(math.log(low) + share * math.log(high / low)):.6g}"
        return f"{low + share * (high - low):.6g}"

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a range that is no choice."""
        return float(self.values[0]), float(self.values[1])

    @property
    def integers(self) -> range:
        """What a range of integers holds, both ends among them where ``step`` divides them."""
        low, high = (round(bound) for bound in self.bounds)
        return range(-(-low // self.step) * self.step, high + 1, self.step)


def parse_search(texts: Sequence[str], config: RunConfig) -> tuple[Range, ...]:
    """Read ``field=loguniform(1e-4,1e-1)`` and the like; ``optimizer.learning_rate`` means the recipe's.

    Both ends of each range, and every choice, are tried in ``config``: a search must not fail at its tenth trial. Of
    batches those are drawn that the workers can share, with what is fixed or searched of the layout.

    Raises:
        ConfigError: nothing to search, a text of another form, an unknown field, a value that the field refuses, or
            no batch that the workers can share.
    """
    if not texts:
        raise ConfigError(f"nothing to search: give --search FIELD=RANGE, with a range such as {EXAMPLES}")
    ranges = tuple(_parsed(text) for text in texts)
    if len({found.field for found in ranges}) < len(ranges):
        raise ConfigError("a field is given two ranges: keep one")
    for found in ranges:
        for value in found.values:
            apply_overrides(config, [f"{found.field}={value}"])
    return tuple(_shared(found, ranges, config) for found in ranges)


def _shared(found: Range, ranges: Sequence[Range], config: RunConfig) -> Range:
    """The range with only such batches as every layout that the search may come to can share."""
    own_batch = config.layout.global_batch == "auto" and all(one.field != BATCHES[1] for one in ranges)
    if found.kind != "randint" or found.field not in BATCHES or (found.field == BATCHES[0] and not own_batch):
        return found
    workers = config.scale.workers
    factors = {
        "scale.workers": workers if isinstance(workers, int) else workers[0],
        "layout.micro_batch": config.layout.micro_batch,
        "layout.accumulation": config.layout.accumulation,
    }
    searched = {one.field: _integers(one) for one in ranges}
    step = math.prod(
        math.lcm(*(searched.get(field) or [1 if fixed == "auto" else fixed])) for field, fixed in factors.items()
    )
    shared = replace(found, step=step)
    if not shared.integers:
        raise ConfigError(
            f"{found.field}: no multiple of {step} lies between {' and '.join(found.values)}, and only those can be "
            "shared by the workers: give it a wider range, or choices"
        )
    return shared


def _integers(found: Range) -> list[int]:
    """The numbers that a range may come to; choices of several, such as 1,4 workers, or of words are none."""
    if found.kind == "choice":
        return [int(value) for value in found.values if value.isdecimal()]
    return list(found.integers) if found.kind == "randint" else []


def draw(ranges: Sequence[Range], count: int, seed: int) -> list[dict[str, str]]:
    """Return ``count`` settings, field to value, spread evenly: the same for the same ``seed``.

    A Latin hypercube: each range is cut into ``count`` equal parts, and of each part there is one value. Independent
    draws leave gaps: of 24 rates over four decades the widest is most often a factor of four, which may hold the best.
    """
    from scipy.stats import qmc  # it takes a second, which nothing but a search should wait for

    shares = qmc.LatinHypercube(len(ranges), rng=seed).random(count)
    return [{found.field: found.at(float(share)) for found, share in zip(ranges, row, strict=True)} for row in shares]


def _parsed(text: str) -> Range:
    field, equals, rest = text.partition("=")
    match = FORM.fullmatch(rest.replace(" ", ""))
    if not equals or not match:
        raise ConfigError(f"--search {text!r}: write it as FIELD=RANGE, with a range such as {EXAMPLES}")
    kind, values = match["kind"], tuple(match["body"].split(","))
    name = field.strip()
    if name.startswith(("optimizer.", "schedule.", "penalties.")):
        name = f"recipe.{name}"
    if kind != "choice":
        _check_bounds(text, kind, values)
    return Range(name, kind, values)  # type: ignore[arg-type]


def _check_bounds(text: str, kind: str, values: tuple[str, ...]) -> None:
    try:
        low, high = (float(value) for value in values)
    except ValueError:
        raise ConfigError(f"--search {text!r}: {kind} takes two numbers, as in {EXAMPLES}") from None
    if not low < high or (kind == "loguniform" and low <= 0):
        rising = "two rising numbers above 0" if kind == "loguniform" else "two rising numbers"
        raise ConfigError(f"--search {text!r}: {kind} takes {rising}")
