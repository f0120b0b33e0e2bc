"""`easyllm plan --ds-config`: what a DeepSpeed configuration means for each rank."""

from pathlib import Path

from easyllm.cli.output import print_json, print_table


def plan_deepspeed(source: str | None, file: str, ranks: int, *, json_output: bool) -> None:
    """Prints what becomes of each key of a configuration, and bytes and messages per rank.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.models.describe import describe
    from easyllm.parallel.deepspeed_config import RecipeValues, read_deepspeed
    from easyllm.plan.deepspeed import plan_ranks
    from easyllm.plan.parameters import count_parameters

    if source is None:
        raise ConfigError("plan --ds-config needs a model; give one, such as llama2-7b")
    config = describe(source)
    recipe = RecipeValues(
        world=ranks, batch_size=ranks, hidden_size=config.hidden_size, precision="bf16"
    )
    settings = read_deepspeed(Path(file), recipe)
    total = count_parameters(config).total
    found = plan_ranks(settings, total, layers=config.num_layers, world=ranks)
    if json_output:
        keys = [
            {"key": k.key, "value": k.value, "fate": k.fate, "note": k.note} for k in settings.keys
        ]
        print_json({"model": source, "ranks": ranks, **found.as_dict(), "keys": keys})
        return
    print_table(
        f"{source} on {ranks} processes, ZeRO stage {settings.stage}",
        ("per process", ""),
        [
            ("weights", f"{found.weight_bytes / 1e9:.2f} GB"),
            ("gradients", f"{found.gradient_bytes / 1e9:.2f} GB"),
            ("optimizer", f"{found.state_bytes / 1e9:.2f} GB"),
            ("sent in a step", f"{found.sent_elements:,} elements"),
            *((f"  {name}", f"{count:,} messages") for name, count in found.messages.items()),
        ],
    )
    rows = [(k.key, k.fate, str(k.value), k.note) for k in settings.keys]
    print_table(file, ("key", "", "value", "note"), rows)


__all__ = ["plan_deepspeed"]
