"""`corral doctor`: what this machine can do with corral, and what to install where it cannot."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from corral.cli.options import json_option

if TYPE_CHECKING:
    from corral.cli.machine import Machine


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check packages, CPU, memory and disk; exit code 3 where corral cannot run a bundle."""
    from corral.cli.machine import compile_targets, look_around
    from corral.cli.tables import print_json
    from corral.spec.errors import EnvironmentProblem

    machine = look_around()
    advice = problems(machine)
    if as_json:
        print_json({**_facts(machine), "targets": compile_targets(machine), "problems": advice})
    else:
        _show(machine)
        if machine.kernels_problem:
            click.echo(f"\n   {machine.kernels_problem}")
        if not machine.can_compile and not advice:
            click.echo('\n   To compile here, too: `pip install "corral[compile]"`.')
    if advice:
        raise EnvironmentProblem(" ".join(advice))


def problems(machine: Machine) -> list[str]:
    """What keeps bundles from running here, each with its remedy."""
    found = [
        f"{' and '.join(names)} are both installed and overwrite each other: run `pip uninstall {' '.join(names)}`, "
        f"then `pip install {names[0]}`."
        for names in machine.conflicts
    ]
    for package in machine.packages:
        if package.needed_by == "corral" and not package.ok:
            got = f"is {package.installed}" if package.installed else "is missing"
            found.append(
                f"{package.name} {got}, expected {package.least} or newer: "
                f'run `pip install -U "{package.name}>={package.least}"`.'
            )
    return found


def _facts(machine: Machine) -> dict[str, Any]:
    facts = dataclasses.asdict(machine)
    packages = [{**dataclasses.asdict(package), "ok": package.ok} for package in machine.packages]
    return {**facts, "packages": packages}


def _show(machine: Machine) -> None:
    from corral.cli.formats import UNKNOWN, size
    from corral.cli.machine import CPU_FEATURES, compile_targets
    from corral.cli.tables import Table, print_table
    from corral.spec.target import TARGETS

    total, free = machine.memory_bytes, machine.memory_free_bytes
    features = "; ".join(f"{name} ({CPU_FEATURES[name]})" for name in machine.cpu_features)
    lines = {
        "python": f"{machine.python} on {machine.system}",
        "cpu": f"{machine.cpu}, {machine.cores} usable core{'s' if machine.cores > 1 else ''}",
        "features": features or "none that CPU kernels look for",
        "kernels": f"corral's own, for {machine.kernels}" if machine.kernels else "ONNX Runtime's only",
        "memory": f"{size(free)} free of {size(total)}" if total and free else "unknown",
        "disk": f"{size(machine.disk_free_bytes)} free here",
        "gpu": f"{machine.gpu}, compute capability {machine.gpu_capability}"
        if machine.gpu
        else machine.gpu_problem.partition(". ")[0],
    }
    for key, value in lines.items():
        click.echo(f"   {key:<10}{value}")
    words = {True: "ok", False: "no"}
    rows = [
        (
            package.name,
            package.installed or UNKNOWN,
            package.least,
            words[package.ok],
            "everything" if package.needed_by == "corral" else package.needed_by,
        )
        for package in machine.packages
    ]
    click.echo()
    print_table(Table(columns=("package", "installed", "at least", "ok", "needed for"), rows=rows))
    targets = [
        (
            name,
            words[can["compile"]],
            words[can["build"]] if TARGETS[name].engine else UNKNOWN,
            ", ".join(TARGETS[name].capabilities) or UNKNOWN,
            words[can["run"]],
        )
        for name, can in compile_targets(machine).items()
    ]
    click.echo()
    columns = ("target", "compiles here", "builds engines here", "for compute capability", "runs here")
    print_table(Table(columns=columns, rows=targets))
    for target in TARGETS.values():
        if lacking := machine.lacks(target):
            click.echo(f"   {target.name} needs here: {'; '.join(lacking)}")
