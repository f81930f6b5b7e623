"""Other programs' names for our settings, commands and targets, for suggestions after a wrong name."""

from collections.abc import Collection

SETTINGS = {
    "out": "output_dir out_dir outdir save_dir output output_file o",
    "config": "recipe cfg model_name model_name_or_path conf",
    "workdir": "output_dir out_dir outdir save_dir output run_dir logdir log_dir checkpoint_dir ckpt_dir resume "
    "resume_from resume_from_checkpoint load ckpt checkpoint_path",
    "name": "run_name exp_name experiment experiment_name title",
    "seed": "random_seed rng_seed",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr learning_rate",
    "optimizer.final_fraction": "min_lr final_lr end_lr lr_min",
    "optimizer.schedule": "lr_schedule lr_scheduler scheduler lr_scheduler_type lr_decay_style",
    "optimizer.warmup_steps": "warmup warmup_iters warmup_ratio lr_warmup lr_warmup_steps num_warmup_steps "
    "warmup_fraction",
    "optimizer.weight_decay": "wd weight_decay",
    "optimizer.clip_norm": "clip grad_clip max_grad_norm gradient_clip gradient_clipping clip_grad grad_norm_clip",
    "optimizer.kind": "optimizer optim opt optimizer_type optimizer.name optimizer.type",
    "optimizer.beta1": "adam_beta1 b1",
    "optimizer.beta2": "adam_beta2 b2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "train.steps": "steps max_steps num_steps n_steps iterations iters max_iters train_iters train_steps epochs epoch "
    "num_epochs n_epochs max_epochs num_train_epochs train.epochs train.num_epochs total_steps num_train_steps",
    "train.total_tokens": "tokens num_tokens train_tokens total_tokens max_train_tokens",
    "train.batch_size": "batch_size bs batch global_batch_size train_batch_size data.batch_size",
    "train.rows_per_device": "micro_batch_size mbs per_device_batch_size per_device_train_batch_size device_batch_size",
    "train.accumulation_steps": "gradient_accumulation_steps grad_accum accum accumulate "
    "accumulate_grad_batches grad_acc",
    "train.log_every": "log_interval logging_steps log_steps log_freq log_every_n_steps",
    "train.compilation_cache": "jax_cache compile_cache xla_cache",
    "data.sequence_length": "seq_len seq_length seqlen max_seq_len max_seq_length sequence_length block_size "
    "context_length "
    "context max_length ctx n_ctx length model.max_length model.max_seq_len model.sequence_length train.seq_len",
    "data.sources.0.path": "data dataset dataset_name dataset_path data_path data_dir train_file train_data "
    "corpus text "
    "files path input train_files data.path data.dataset data.train",
    "data.tokenizer": "tokenizer_name tokenizer_path vocab_file",
    "data.held_out_fraction": "val_split validation_split val_fraction test_size eval_split held_out",
    "data.workers": "num_workers workers dataloader_num_workers num_proc",
    "model.num_layers": "layers n_layers n_layer num_layers num_hidden_layers depth",
    "model.hidden_size": "d_model dim n_embd hidden_dim embed_dim width hidden model_dim emb_dim dmodel",
    "model.mlp_size": "intermediate_size ffn_dim d_ff ffn_hidden_size mlp_dim ff_dim",
    "model.vocab_size": "vocab n_vocab vocabulary",
    "model.attention.num_heads": "heads n_heads n_head num_heads num_attention_heads",
    "model.attention.num_kv_heads": "kv_heads n_kv_heads num_kv_heads num_key_value_heads",
    "model.attention.kind": "attention attn attention_type",
    "model.moe.num_experts": "experts n_experts num_experts num_local_experts n_routed_experts",
    "model.moe.experts_per_token": "top_k topk num_experts_per_tok moe_top_k router_topk",
    "model.moe.expert_size": "moe_intermediate_size expert_dim moe_ffn_hidden_size",
    "model.dtype": "dtype precision bf16 fp16 compute_dtype mixed_precision torch_dtype",
    "model.remat.moe": "remat gradient_checkpointing activation_checkpointing recompute",
    "model.mtp.depth": "mtp num_nextn_predict_layers mtp_depth",
    "parallel.fsdp": "gpus num_gpus n_gpus devices num_devices fsdp zero",
    "parallel.tensor": "tp tensor_parallel tensor_parallel_size tp_size",
    "parallel.stage": "pp pipeline pipeline_parallel pipeline_parallel_size pp_size stages",
    "parallel.data": "dp data_parallel data_parallel_size ddp replicas",
    "parallel.expert": "ep expert_parallel expert_parallel_size",
    "parallel.context": "cp sp context_parallel sequence_parallel context_parallel_size",
    "checkpoint.every": "save_every save_steps save_interval ckpt_every checkpoint_interval save_freq checkpoint_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep",
    "evaluation.every": "eval_every eval_steps eval_interval eval_freq val_interval val_every eval_iters",
    "tracking.trackers": "wandb report_to tracker logger use_wandb mlflow tensorboard",
    "tracking.project": "wandb_project project",
    "max_tokens": "max_new_tokens n_tokens num_tokens length max_length n_predict",
    "temperature": "temp t",
    "prompt": "text input p question",
    "model": "model_path checkpoint model_name path m model_name_or_path hf_model",
    "step": "checkpoint ckpt iteration",
    "n": "num_samples samples num_return_sequences",
    "port": "p",
    "tasks": "task benchmark benchmarks",
    "topology": "cluster chips hardware accelerator gpus machine nodes tpu gpu",
    "processes": "nproc nproc_per_node num_processes procs np ranks",
    "target": "engine backend platform cloud",
    "rows_per_chip": "micro_batch_size per_device_batch_size mbs",
    "dry_run": "dryrun print",
    "html": "page out output",
    "once": "one_shot",
    "every": "interval refresh",
    "sweep.optimizer.learning_rate": "sweep.lr",
}
"""A setting, and the names that it goes by elsewhere."""

COMMANDS = {
    "train": "finetune fine-tune fine_tune sft pretrain fit run resume start continue",
    "generate": "sample infer inference complete completion predict gen",
    "chat": "talk chatbot repl interactive",
    "serve": "server api host deploy",
    "eval": "evaluate evaluation test benchmark bench score perplexity lm_eval",
    "import": "convert load download pull from-hf",
    "export": "save convert-hf to-hf push upload gguf publish",
    "report": "plot plots summary summarize",
    "watch": "monitor tail tensorboard status dashboard top logs",
    "describe": "info show params parameters inspect count size memory",
    "data": "prepare tokenize tokenise preprocess dataset corpus tokenizer",  # codespell:ignore tokenise
    "checkpoints": "checkpoint ckpt list ls prune average verify",
    "sweep": "tune hyperopt search ablate ablation grid",
    "launch": "submit slurm sbatch kubernetes k8s torchrun distributed cluster accelerate mpirun",
    "plan": "estimate cost simulate",
}
"""A command, and the names that it goes by elsewhere."""

TARGETS = {
    "gke-tpu or gke-gpu": "kubernetes k8s kube kubectl gke jobset google-kubernetes eks aks kueue k3s openshift",
    "tpu-vm": "tpu tpu_vm tpuvm gcp gcloud google cloud-tpu cloud_tpu queued-resource tpu-pod",
    "skypilot": "sky aws azure lambda runpod lambdalabs cloud ec2 nebius",
    "slurm": "sbatch srun cluster hpc pbs pyxis enroot",
    "local": "localhost here torchrun mpirun single this-machine",
}
"""A target of `opendeep launch`, and the names that it goes by elsewhere."""


def known_synonym(word: str, table: dict[str, str], known: Collection[str] | None = None) -> str:
    """Return our name for what is `word` elsewhere, or empty; of those in `known`, if that is given.

    Hyphens, capitals and leading dashes make no difference. Of a dotted name that is in no list, its last part counts.
    """
    word = word.lstrip("-").lower()
    for spelling in (word, word.replace("-", "_"), word.rpartition(".")[2].replace("-", "_")):
        for name, others in table.items():
            if (known is None or name in known) and spelling in others.split():
                return name
    return ""
