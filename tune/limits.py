"""A budget -> what parts weigh against it, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence

from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.tune.select import Limit
from corral.tune.sensitivity import Meter
from corral.tune.sizes import Sizes
from corral.tune.speed import Speeds
from corral.tune.tuned import Budget

SMALLEST = Choice(weights="int4", group_size=32, method="rtn")


def limit_of(budget: Budget, parts: Sequence[Part], meter: Meter, sizes: Sizes, speeds: Speeds | None) -> Limit:
    """A limit on divergence: the fewest bytes within it. On bytes, or on the time of a token: the least divergence."""
    if budget.what == "kl":
        return Limit(
            load=lambda one: one.kl,
            value=lambda one: one.bytes,
            whole=meter.divergence,
            limit=budget.limit,
            loads_limit=budget.limit,
        )
    if budget.what == "size":
        smallest = dict.fromkeys(parts, SMALLEST)
        rest = sizes.bundle(smallest) - sizes.parts(smallest)
        return Limit(
            load=lambda one: one.bytes,
            value=lambda one: one.kl,
            whole=sizes.bundle,
            limit=budget.limit,
            loads_limit=budget.limit - rest,
        )
    assert speeds is not None
    return Limit(
        load=lambda one: speeds.foretold(one.part, one.choice.storage),
        value=lambda one: one.kl,
        whole=speeds.seconds,
        limit=1 / budget.limit,
        loads_limit=1 / budget.limit,
    )
