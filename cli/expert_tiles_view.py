"""`corral plan` for a target with engines: in how many tiles experts are multiplied, and what that moves in a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from corral.spec.expert_tiles import PREFILL_TOKENS, best_tiles, fitting_tiles, tiled_experts
from corral.spec.gpus import Gpu
from corral.spec.model_config import ModelConfig


def expert_tiles(config: ModelConfig, weights: str, group_size: int, gpu: Gpu) -> dict[str, Any]:
    """The number chosen, and the model's figures for each: one token, and a prefill."""
    figures = [
        dataclasses.asdict(
            tiled_experts(config, weights=weights, group_size=group_size, gpu=gpu, tokens=tokens, tiles=tiles)
        )
        for tiles in fitting_tiles(config, group_size)
        for tokens in (1, PREFILL_TOKENS)
    ]
    return {"chosen": best_tiles(config, weights=weights, group_size=group_size, gpu=gpu), "figures": figures}


def show_expert_tiles(data: dict[str, Any], gpu: Gpu) -> None:
    """Print them as a table, one row a number of tiles."""
    from corral.cli.formats import size
    from corral.cli.tables import Table, print_table

    figures = data["figures"]
    rows = [
        (
            f"{decode['tiles']}{' (chosen)' if decode['tiles'] == data['chosen'] else ''}",
            size(decode["copy_bytes"]),
            "yes" if decode["in_cache"] else "no",
            size(decode["dram_bytes"]),
            f"{decode['seconds'] * 1e6:.0f}",
            size(prefill["copy_bytes"]),
        )
        for decode, prefill in zip(figures[::2], figures[1::2], strict=True)
    ]
    click.echo(
        f"\n   experts of a layer in tiles of columns, on {gpu.title} ({gpu.l2_bytes >> 20} MiB of L2 cache); "
        "computed, not measured"
    )
    columns = (
        "tiles",
        "copy of a token>",
        "in L2",
        "DRAM a token>",
        "µs at least>",
        f"copies of {PREFILL_TOKENS} tokens>",
    )
    print_table(Table(columns=columns, rows=rows))
