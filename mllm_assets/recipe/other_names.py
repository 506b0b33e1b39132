"""What a key of another trainer, or of an earlier LLaMA-Factory, is called here.

Read from LLaMA-Factory 0.2 to 0.9, ms-swift 2 and 3, TRL's `SFTConfig`, `GRPOConfig` and `ModelConfig`, transformers'
`BitsAndBytesConfig`, Axolotl, LLaVA and Qwen-VL. Their keys are often like keys of another meaning here: `max_pixels`
is like `video_max_pixels`, `train_mm_proj_only` like `train_on_prompt`. So they are not guessed at.
"""

from mllm_assets.errors import nearest

# the key here, and the names that mean it
_RENAMED = {
    "model_name_or_path": "model model_id model_id_or_path model_name base_model",
    "finetuning_type": "train_type tuner_type sft_type adapter",
    "freeze_trainable_layers": "num_layer_trainable",
    "freeze_trainable_modules": "name_module_trainable",
    "freeze_extra_modules": "trainable_parameters",
    "freeze_vision_tower": "freeze_vit freeze_vision freeze_vision_encoder",
    "freeze_multi_modal_projector": "freeze_aligner freeze_projector freeze_merger",
    "freeze_language_model": "freeze_llm",
    "lora_rank": "lora_r lora_dim",
    "lora_dropout": "lora_dropout_p",
    "lora_target": "target_modules lora_target_modules target_regex lora_modules",
    "quantization_bit": "quant_bits",
    "quantization_type": "bnb_4bit_quant_type",
    "quantization_method": "quant_method",
    "double_quantization": "bnb_4bit_use_double_quant use_bnb_nested_quant",
    "dataset": "dataset_name datasets train_dataset train_file data_path",
    "eval_dataset": "val_dataset eval_file validation_file",
    "dataset_dir": "custom_dataset_info",
    "template": "template_type prompt_template chat_template",
    "cutoff_len": "max_source_length max_target_length max_seq_length max_seq_len model_max_length sequence_len",
    "max_samples": "train_dataset_sample dataset_sample",
    "val_size": "split_dataset_ratio dataset_test_ratio val_set_size",
    "packing": "sft_packing sample_packing",
    "image_max_pixels": "max_pixels image_resolution image_max_size",
    "image_min_pixels": "min_pixels",
    "deepspeed": "deepspeed_config",
    "resume_from_checkpoint": "resume resume_from resume_checkpoint",
    "flash_attn": "sdpa attn_impl attn_implementation flash_attention use_flash_attn",
    "learning_rate": "lr",
    "adapter_name_or_path": "checkpoint_dir adapters lora_model_dir",
    "vision_lr": "vit_lr vision_tower_lr mm_vision_tower_lr",
    "projector_lr": "aligner_lr mm_projector_lr",
    "default_system": "system system_message system_prompt",
    "additional_target": "modules_to_save lora_modules_to_save",
    "neftune_noise_alpha": "neftune_alpha",
    "label_smoothing_factor": "label_smoothing",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "warmup_steps": "warmup",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulate_grad_batches",
    "seed": "random_state random_seed",
    "early_stopping_steps": "early_stopping_patience",
    "dataloader_num_workers": "num_workers",
    "tokenized_path": "cache_path",
    "reward": "reward_funcs reward_weights reward_functions",
    "max_completion_length": "max_response_length response_length",
    "output_dir": "output",
}
_OTHERWISE = {
    "Set finetuning_type: full, freeze_vision_tower: true, freeze_language_model: true and "
    "freeze_multi_modal_projector: false.": "train_mm_proj_only tune_mm_proj tune_mm_mlp_adapter",
    "Set freeze_vision_tower, the opposite.": "tune_mm_vision tune_vision_tower train_vision_encoder",
    "Set freeze_multi_modal_projector, the opposite.": "tune_mm_mlp tune_projector train_vision_projector",
    "Set freeze_language_model, the opposite.": "tune_mm_llm tune_language_model",
    "Tower and projector can have a learning rate of their own: vision_lr, projector_lr. Delete the line.": """
        embedding_lr llm_lr""",
    "Set finetuning_type: lora.": "use_lora use_peft lora_enable",
    "Weights train in 32 bits where neither bf16, fp16 nor pure_bf16 is set. Delete the line.": "fp32 float32",
    "Set quantization_bit: 4.": "load_in_4bit",
    "Set quantization_bit: 8.": "load_in_8bit",
    "Set bf16: true, fp16: true or pure_bf16: true.": """
        torch_dtype dtype precision mixed_precision bnb_4bit_compute_dtype""",
    "The family follows from the model's config.json. Delete the line.": "model_type",
    "Answers alone are supervised, unless train_on_prompt: true. Delete the line.": """
        assistant_only_loss completion_only_loss train_on_inputs loss_scale""",
    "Columns and splits are in dataset_info.json. Delete the line.": """
        dataset_text_field dataset_train_split dataset_test_split image_folder media_root""",
    "Rows with pictures are recognised. Delete the line.": "visual_inputs",
    "Set video_max_pixels, the area of a frame.": "video_resolution",
    "Megatron spreads one model over GPUs; here fsdp: true does. Delete the line.": """
        tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel bias_activation_fusion apply_rope_fusion
        use_distributed_optimizer overlap_grad_reduce overlap_param_gather moe_grouped_gemm moe_token_dispatcher_type
        recompute_granularity""",
    "Answers are drawn for each step by the model that trains, so that nothing is clipped. Delete the line.": """
        epsilon epsilon_high num_iterations steps_per_generation use_vllm""",
    "It has no counterpart here. Delete the line.": """
        tuner_backend lazy_tokenize efficient_eos reserved_label_len lora_bias packing_strategy pad_to_multiple_of
        val_dataset_sample image_aspect_ratio min_lr""",
}
OTHER_NAMES = {name: f"Here it is {key}." for key, names in _RENAMED.items() for name in names.split()}
OTHER_NAMES |= {name: advice for advice, names in _OTHERWISE.items() for name in names.split()}


def advice_for(name: str, keys: list[str]) -> tuple[str, str | None]:
    """What to do about an unknown key, and the known key that it may be a typing mistake of."""
    if (advice := OTHER_NAMES.get(name.lower())) is not None:
        return advice, None
    for near in nearest(name, keys):
        return f"Did you mean {near}?", near
    return "Delete the line; keys are those of LLaMA-Factory's SFT.", None
