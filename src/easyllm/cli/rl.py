"""The `easyllm rl` commands: the doctor of a run, and the gridworld."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.output import JsonFlag, home_path, print_json, print_table

rl_app = typer.Typer(
    no_args_is_help=True,
    help="""Look into reinforcement learning: why a run does not learn, and a small gridworld.

    [bold]Examples[/bold]

        easyllm rl doctor runs/grpo-arithmetic

        easyllm rl gridworld
    """,
)


def register(app: typer.Typer) -> None:
    """Adds the `rl` command group to `app`."""
    app.add_typer(rl_app, name="rl")


@rl_app.command("doctor")
def doctor(
    run: Annotated[
        Path,
        typer.Argument(
            callback=home_path, help="Output folder of a training run, finished or not."
        ),
    ],
    json_output: JsonFlag = False,
) -> None:
    """Say what is unusual in a run and what to change; exit code 1 if there is anything.

    It reads the metrics of runs with rewards or preferences: GRPO, PPO, DPO, reward models.

    [bold]Examples[/bold]

        easyllm rl doctor runs/grpo-arithmetic

        easyllm rl doctor runs/dpo --json
    """
    from easyllm.rl.doctor import diagnose

    found = diagnose(run)
    if json_output:
        print_json(found.as_dict())
    elif not found.findings:
        sys.stdout.write(f"nothing unusual in {len(found.checked)} checks\n")
    for each in found.findings if not json_output else ():
        sys.stdout.write(
            f"{each.name}: {each.metric} = {each.value:.4g} (usual: {each.usual})\n"
            f"  {each.change}\n"
        )
    if found.findings:
        raise typer.Exit(1)


@rl_app.command("gridworld")
def gridworld(
    slip: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability of moving to a side.")
    ] = 0.2,
    discount: Annotated[
        float, typer.Option(min=0.01, max=0.999, help="Discount γ of later rewards.")
    ] = 0.95,
    episodes: Annotated[
        int, typer.Option(min=1, max=100_000, help="Sampled episodes for TD and GAE.")
    ] = 2000,
    json_output: JsonFlag = False,
) -> None:
    """Solve a small gridworld, and compare what is estimated from samples with the exact values.

    [bold]Examples[/bold]

        easyllm rl gridworld

        easyllm rl gridworld --slip 0 --discount 0.9 --json
    """
    from easyllm.rl.gridworld_report import gridworld_report

    report = gridworld_report(slip=slip, discount=discount, episodes=episodes)
    if json_output:
        print_json(report.as_dict())
        return
    for title, lines in report.grids.items():
        sys.stdout.write("\n".join([title, *(f"  {line}" for line in lines), ""]) + "\n")
    rows = [(name, f"{error:.2e}") for name, error in report.errors.items()]
    print_table("Largest difference", ("what", "difference"), rows)
