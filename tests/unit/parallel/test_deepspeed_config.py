"""DeepSpeed configurations: every key honoured, mapped, ignored with a reason, or rejected."""

import json

import pytest

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.parallel.deepspeed_config import RecipeValues, read_deepspeed
from easyllm.train import TrainConfig
from easyllm.train.deepspeed import ranks_of_file, table, with_deepspeed

RECIPE = RecipeValues(
    world=4, batch_size=64, micro_batch=4, clip_norm=0.7, learning_rate=3e-4, warmup_steps=10,
    total_steps=200, hidden_size=64, precision="bf16",
)  # fmt: skip
FP16 = {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
    "hysteresis": 2, "min_loss_scale": 1,
}  # fmt: skip
AUTO_SIZES = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip
STAGE2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True,
    "round_robin_gradients": True,
}  # fmt: skip
STAGE3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
OFFLOAD = {"device": "cpu", "pin_memory": True}
PUBLISHED = {
    # the keys of the examples of LLaMA-Factory (ds_z0, z2, z3, z3_offload)
    "factory-0": {
        **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"}, "zero_optimization": STAGE2 | {"stage": 0},
    },
    "factory-2": {
        **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"}, "zero_optimization": STAGE2,
    },
    "factory-3": {
        **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"}, "zero_optimization": STAGE3,
    },
    "factory-3-offload": {
        **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"},
        "zero_optimization": STAGE3 | {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
    },
    "factory-2-offload": {
        **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"},
        "zero_optimization": STAGE2 | {"offload_optimizer": OFFLOAD},
    },
    "factory-2-tensor": {
        "_comment": "models", **AUTO_SIZES, "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"}, "zero_optimization": STAGE2,
        "tensor_parallel": {"autotp_size": 2},
    },
    # of Hugging Face's documentation
    "hugging-face-2": {
        **AUTO_SIZES, "fp16": FP16, "bf16": {"enabled": "auto"}, "optimizer": OPTIMIZER,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": SCHEDULER["params"] | {"last_batch_iteration": -1, "total_num_steps": "auto"},
        },
        "zero_optimization": STAGE2 | {"offload_optimizer": OFFLOAD},
        "amp": {"enabled": False, "opt_level": "O1"},
    },
    "hugging-face": {
        **AUTO_SIZES, "fp16": FP16, "optimizer": OPTIMIZER, "scheduler": SCHEDULER,
        "zero_optimization": STAGE3 | {"offload_optimizer": OFFLOAD}, "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    # of axolotl (zero1, zero3_bf16)
    "axolotl-1": {
        "zero_optimization": {"stage": 1, "overlap_comm": True}, "bf16": {"enabled": True},
        "fp16": FP16 | {"auto_cast": False}, "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
    "axolotl-2-compile": {
        "compile": {"disable": False, "backend": "inductor"}, **AUTO_SIZES,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"},
                              "contiguous_gradients": True, "overlap_comm": True},
        "bf16": {"enabled": "auto"}, "fp16": FP16 | {"auto_cast": False, "initial_scale_power": 32},
        "wall_clock_breakdown": False,
    },
    "axolotl-3-offload": {
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": STAGE3 | {
            "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD, "sub_group_size": 0,
            "max_live_parameters": 0, "max_reuse_distance": 0,
            "gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": True, "loss_scale": 0, "auto_cast": False}, **AUTO_SIZES,
        "wall_clock_breakdown": False,
    },
    "axolotl-3": {
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": STAGE3 | {"max_live_parameters": 0, "max_reuse_distance": 0,
                                       "gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": True}, **AUTO_SIZES, "wall_clock_breakdown": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_published_examples_are_all_accounted_for(name):
    values = PUBLISHED[name]
    settings = read_deepspeed(values, RECIPE)
    written = {key.split(".")[0] for key in (each.key for each in settings.keys)}
    assert set(values) <= written | {"fp16", "bf16"}
    for key in values["zero_optimization"]:
        assert f"zero_optimization.{key}" in {each.key for each in settings.keys}
    assert all(each.note for each in settings.keys if each.fate != "honoured")
    assert settings.stage == values["zero_optimization"]["stage"]
    assert settings.batch_size == 64
    assert (settings.micro_batch, settings.accumulation) == (4, 4)
    assert settings.precision == "bf16"
    assert settings.clip_norm == 0.7
    assert all("auto" not in str(each.value) for each in settings.keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_published_examples_says_why(name):
    settings = read_deepspeed(PUBLISHED[name], RECIPE)
    for key, line in zip(settings.keys, table(settings.keys), strict=True):
        assert line.startswith(key.key)
        assert key.fate in line
        assert key.note in line


def test_a_section_that_is_not_supported_is_refused_only_if_it_is_in_use():
    for section in ({"enabled": False}, {"enabled": "auto", "opt_level": "auto"}):
        settings = read_deepspeed({"amp": section, "fp8": section}, RECIPE)
        fates = {each.key: each.fate for each in settings.keys}
        assert (fates["amp"], fates["fp8"]) == ("ignored", "ignored")
    values = {"fp8": {"enabled": True}, "sequence_parallel": {"enabled": True, "size": 4}}
    with pytest.raises(ConfigError, match=r"has fp8, .*use bf16; has sequence_parallel, "):
        read_deepspeed(values, RECIPE)


def test_auto_takes_the_recipe_s_values():
    settings = read_deepspeed(PUBLISHED["hugging-face"], RECIPE)
    kind, params = settings.optimizer
    assert kind == "adamw"
    assert params == {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert settings.scheduler == (
        "constant",
        {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10},
    )
    sizes = {each.key.removeprefix("zero_optimization."): each.value for each in settings.keys}
    assert sizes["reduce_bucket_size"] == 64 * 64
    assert sizes["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert sizes["stage3_param_persistence_threshold"] == 640


def test_numbers_may_be_strings_and_older_names_are_read():
    values = {
        "train_batch_size": "8",
        "gradient_clipping": "0.5",
        "zero_optimization": {"stage": "3", "reduce_bucket_size": "5e8", "cpu_offload": True},
    }
    settings = read_deepspeed(values, RecipeValues())
    assert (settings.batch_size, settings.clip_norm) == (8, 0.5)
    assert settings.bucket_elements == 500_000_000
    assert settings.offload


def test_no_clipping_and_the_absent_key_are_told_apart():
    assert read_deepspeed({"gradient_clipping": 0}, RECIPE).clip_norm is None
    absent = read_deepspeed({}, RECIPE)
    assert absent.clip_norm == 0.7
    assert "DeepSpeed: 1.0" in next(k.note for k in absent.keys if k.key == "gradient_clipping")


def test_all_problems_are_reported_together():
    values = {
        "train_batch_size": 30,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_cliping": 1.0,
        "zero_optimization": {"stage": "auto", "offload_param": {"device": "nvme"}},
        "scheduler": {"type": "OneCycle", "params": {}},
        "amp": {"enabled": True},
    }
    with pytest.raises(ConfigError) as error:
        read_deepspeed(values, RECIPE)
    for part in (
        "train_batch_size=30, but 4 ranks x micro-batches of 4 x 2 accumulation steps are 32",
        "gradient_cliping (did you mean 'gradient_clipping'?)",
        "stage='auto', which DeepSpeed reads as 0",
        "NVMe",
        "OneCycle",
        "has amp",
    ):
        assert part in str(error.value)


def recipe(tmp_path, values, **changes):
    (tmp_path / "ds.json").write_text(json.dumps(values))
    base = {"data": {"train": ["rows.jsonl"]}, "deepspeed": str(tmp_path / "ds.json")}
    return validate(TrainConfig, base | changes, source="test")


def test_a_recipe_takes_over_the_file(tmp_path):
    values = PUBLISHED["hugging-face"] | {"train_batch_size": 16, "gradient_clipping": 0.3}
    values["zero_optimization"] = {"stage": 2, "reduce_bucket_size": 2**20}
    values["fp16"] = FP16 | {"enabled": True, "initial_scale_power": 12}
    config = with_deepspeed(recipe(tmp_path, values), 2, quiet=True)
    assert config.parallel.layout == "zero2"
    assert config.parallel.bucket_mb == 4
    assert (config.batch_size, config.clip_norm, config.precision) == (16, 0.3, "fp16")
    assert config.loss_scale.initial_power == 12
    assert config.schedule.kind == "constant"
    # resolving the recorded recipe of a run again, to resume it, changes nothing
    assert with_deepspeed(config, 2, quiet=True) == config


def test_a_recipe_of_another_objective_takes_over_the_file(tmp_path):
    changes = {
        "objective": {"kind": "dpo"},
        "data": {"kind": "preferences", "train": ["rows.jsonl"]},
    }
    values = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    config = with_deepspeed(recipe(tmp_path, values, **changes), 1, quiet=True)
    assert (config.objective.kind, config.optimizer.learning_rate) == ("dpo", 0.5)


def test_a_contradiction_with_the_recipe_names_both_values(tmp_path):
    config = recipe(tmp_path, {"train_batch_size": 16, "gradient_clipping": 0.3}, clip_norm=2.0)
    with pytest.raises(ConfigError, match=r"clip_norm is 2.0 in the recipe and 0.3 in the file"):
        with_deepspeed(config, 1, quiet=True)


def test_the_number_of_processes_of_a_file(tmp_path):
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}
    config = recipe(tmp_path, sizes | {"gradient_accumulation_steps": 2})
    assert ranks_of_file(tmp_path / "ds.json") == 8
    assert with_deepspeed(config, 8, quiet=True).batch_size == 64
    with pytest.raises(ConfigError, match="says train_batch_size=64, but 2 ranks"):
        with_deepspeed(config, 2, quiet=True)


def test_the_table_has_a_line_for_each_key():
    settings = read_deepspeed(PUBLISHED["factory-2"], RECIPE)
    lines = table(settings.keys)
    assert len(lines) == len(settings.keys)
    assert any("overlap_comm" in line and "ignored" in line for line in lines)


def test_an_unreadable_file_is_a_sentence(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_deepspeed(tmp_path / "ds.json", RECIPE)
