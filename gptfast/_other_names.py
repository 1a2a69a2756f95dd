"""What nanoGPT, transformers and others call our options, to answer a name that is not ours with the one that is meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_THEIRS = {  # our name -> theirs, in words that `likely` compares
    "adapter": "lora lora_path peft",
    "assistant_model": "draft_model speculative_model model_draft",
    "batch_size": "bs per_device_train_batch_size train_batch_size micro_batch_size device_batch_size per_device_eval_batch_size "
    "total_batch_size",
    "beta1": "adam_beta1 betas",
    "beta2": "adam_beta2 betas",
    "block_size": "seq_len seq_length sequence_length max_seq_len max_seq_length context context_length context_size ctx_size n_ctx "
    "n_positions model_max_length max_position_embeddings",
    "checkpoint_every": "save_steps save_every save_interval save_freq ckpt_every checkpoint_interval checkpoint_steps "
    "always_save_checkpoint",
    "compile": "torch_compile",
    "context": "seq_len max_seq_len max_length context_length n_ctx block_size",
    "data": "dataset dataset_name data_dir data_path train_data train_file train_files input inputs file text corpus",
    "dropout": "attn_pdrop resid_pdrop embd_pdrop attention_dropout hidden_dropout dropout_p",
    "dtype": "bf16 fp16 fp32 amp precision mixed_precision torch_dtype half",
    "ema": "ema_decay use_ema",
    "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "eval_batches": "eval_iters",
    "eval_every": "eval_interval eval_steps val_every val_interval val_check_interval validate_every",
    "find_batch_size": "auto_find_batch_size auto_batch_size",
    "grad_accum": "gradient_accumulation_steps gradient_accumulation grad_accum_steps accumulation_steps accumulate_grad_batches",
    "grad_clip": "clip clip_grad clip_grad_norm max_grad_norm gradient_clip gradient_clip_val gradient_clipping",
    "init_from": "model model_name_or_path pretrained checkpoint ckpt load_from from_pretrained finetune_from",
    "keep_last": "save_total_limit",
    "learning_rate": "lr max_lr learn_rate",
    "log_every": "log_interval logging_steps log_steps print_every",
    "log_to": "wandb wandb_log wandb_project wandb_run_name use_wandb report_to logger",
    "lr_decay_steps": "lr_decay_iters",
    "max_minutes": "max_time time_limit",
    "max_new_tokens": "max_tokens max_length n_predict length num_tokens",
    "max_steps": "max_iters iters iterations num_iterations steps num_steps n_steps max_train_steps train_steps total_steps epochs "
    "num_train_epochs num_epochs max_epochs n_epochs",
    "min_lr": "min_learning_rate lr_min",
    "model": "checkpoint ckpt ckpt_path pretrained model_name_or_path model_path out_dir init_from hf_model",
    "n_embd": "hidden_size hidden_dim d_model embed_dim embedding_dim n_embed dim width",
    "n_head": "num_attention_heads num_heads heads n_heads",
    "n_layer": "num_hidden_layers num_layers layers n_layers depth",
    "name": "served_model_name alias",
    "num_beams": "beams beam_size beam_width",
    "num_return_sequences": "num_samples n_samples best_of",
    "optimizer": "optim optimiser",
    "out": "out_dir outdir output output_dir save_dir logging_dir",
    "overwrite": "overwrite_output_dir force",
    "parallel": "ddp fsdp distributed",
    "patience": "early_stopping early_stopping_patience",
    "preset": "model model_type config_name arch architecture",
    "prompt": "start text",
    "quantize": "quantization load_in_4bit load_in_8bit bits",
    "recompute": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "repetition_penalty": "repeat_penalty",
    "resume": "resume_from_checkpoint resume_from continue",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler decay_lr",
    "seed": "random_seed manual_seed",
    "stop": "stop_strings stop_sequences",
    "temperature": "temp",
    "tensor_parallel": "tp tensor_parallel_size",
    "threads": "num_threads n_threads",
    "val_fraction": "val_split validation_split val_ratio test_size",
    "vocab_size": "n_vocab num_merges",
    "warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio",
    "weight_decay": "wd",
    "workers": "num_workers num_proc preprocessing_num_workers dataloader_num_workers jobs",
}


def likely(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The names that may be meant by one that is unknown; [] where nothing is like it.

    Args:
        name: as it was written, with dashes or underscores.
        known: names of parameters, with underscores.
        most: names to find by their spelling; those that other programs call so are all returned.
    """
    name, known = name.strip("-").replace("-", "_").lower(), list(known)
    if name in known:
        return [name]
    ours = [own for own, theirs in _THEIRS.items() if name in theirs.split()]
    if ours:
        return [own for own in ours if own in known]
    return get_close_matches(name, known, most)
