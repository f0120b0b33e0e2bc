"""The keys of a DeepSpeed configuration that change no result here, or are not supported."""

PERFORMANCE = "changes speed and memory only; FSDP2 and our buckets have their own schedule"
NO_SCALING = "bf16 has the range of fp32, so that losses are not scaled"
IGNORED: dict[str, str] = {
    "_comment": "a comment",
    "compile": "the recipe's compile decides",
    "steps_per_print": "metrics.jsonl has every step (log_every)",
    "wall_clock_breakdown": "metrics.jsonl has the time of every step",
    "dump_state": "prints only",
    "memory_breakdown": "prints only",
    "zero_allow_untested_optimizer": "every optimizer here is tested with every stage it is for",
    "zero_force_ds_cpu_optimizer": "DeepSpeed's CPU optimizer is not used",
    "disable_allgather": "speed only",
    "communication_data_type": "gradients are summed in the dtype of the master weights",
    "prescale_gradients": "gradients are summed and divided by the tokens of all ranks once",
    "gradient_predivide_factor": "gradients are summed and divided by the tokens of all ranks once",
    "sparse_gradients": "gradients of embeddings are dense",
    "zero_optimization.overlap_comm": "buckets are always reduced during the backward pass",
    "zero_optimization.contiguous_gradients": "buckets are always contiguous",
    "zero_optimization.reduce_scatter": "ZeRO always uses reduce-scatter",
    "zero_optimization.allgather_partitions": "weights are always all-gathered",
    "zero_optimization.allgather_bucket_size": PERFORMANCE,
    "zero_optimization.round_robin_gradients": PERFORMANCE,
    "zero_optimization.sub_group_size": PERFORMANCE,
    "zero_optimization.stage3_prefetch_bucket_size": PERFORMANCE,
    "zero_optimization.stage3_param_persistence_threshold": PERFORMANCE,
    "zero_optimization.stage3_max_live_parameters": PERFORMANCE,
    "zero_optimization.stage3_max_reuse_distance": PERFORMANCE,
    "zero_optimization.ignore_unused_parameters": "parameters without a gradient are skipped",
    "zero_optimization.load_from_fp32_weights": "checkpoints always hold fp32 master weights",
    "zero_optimization.elastic_checkpoint": "checkpoints are always read by any number of ranks",
    "zero_optimization.memory_efficient_linear": "matrix products save the same tensors",
    "zero_optimization.legacy_stage1": "there is one implementation of stage 1",
    "fp16.auto_cast": "inputs are token ids",
    "fp16.fp16_master_weights_and_grads": "master weights are always fp32",
    "fp16.consecutive_hysteresis": "the loss scaler resets its hysteresis after a good window",
    "bf16.auto_cast": "inputs are token ids",
    **{
        f"bf16.{name}": NO_SCALING
        for name in (
            *("loss_scale", "initial_scale_power", "loss_scale_window"),
            *("hysteresis", "min_loss_scale"),
        )
    },
    "bf16.immediate_grad_update": "gradients are accumulated in fp32",
    "flops_profiler": "metrics.jsonl has the share of peak FLOP/s (speed/mfu)",
    "tensorboard": "set tensorboard=true in the recipe",
    "wandb": "metrics are in metrics.jsonl",
    "csv_monitor": "metrics are in metrics.jsonl",
    "monitor_config": "metrics are in metrics.jsonl",
    "comms_logger": "prints only",
    "comms_config": "prints only",
    "scheduler.params.last_batch_iteration": "a run resumes where its checkpoint stopped",
    "activation_checkpointing": "the recipe's checkpoint_activations decides",
    "aio": "nothing is offloaded to NVMe",
    "torch_autocast": "the recipe's precision decides",
}
"""Keys without an effect on what is learned; a key stands for everything below it."""
REJECTED: dict[str, str] = {
    "amp": "use bf16 or fp16",
    "fp8": "use bf16",
    "sequence_parallel": "use tensor_parallel, and parallel.sequence in the recipe",
    "sequence_parallel_size": "use tensor_parallel, and parallel.sequence in the recipe",
    "sparse_attention": "attention is exact",
    "compression_training": "use easyllm quantize",
    "data_efficiency": "order and mixture of the data are the recipe's",
    "curriculum_learning": "order and mixture of the data are the recipe's",
    "elasticity": "the batch size would depend on the number of processes",
    "pipeline": "use zero_optimization or tensor_parallel",
    "progressive_layer_drop": "all layers are trained in every step",
    "hybrid_engine": "use easyllm's own engine for rollouts",
    "autotuning": "use easyllm plan",
}
NESTED = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "tensor_parallel")
ZERO_KEYS = (
    "stage",
    "reduce_bucket_size",
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "stage3_gather_16bit_weights_on_model_save",
    "zero_hpz_partition_size",
)
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "muon": "muon"}
SCHEDULERS = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}

__all__ = ["IGNORED", "NESTED", "OPTIMIZERS", "REJECTED", "SCHEDULERS", "ZERO_KEYS"]
