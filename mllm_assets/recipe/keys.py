"""Every key of LLaMA-Factory's SFT arguments: supported, without effect here, or refused, and why.

Read from llamafactory 0.9.5 and from `Seq2SeqTrainingArguments` of transformers 4.55 to 5.23, which it inherits;
`tests/golden/llamafactory_keys.json` holds what the released package declares, and a test compares.
Supported keys are the fields of `TrainSpec`. The others are listed below by reason, as `name:type=default`; a value
that asks for nothing more than the default is accepted silently.
"""

import dataclasses
import json
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mllm_assets.families.family import TEMPLATES
from mllm_assets.recipe.spec import TrainSpec

Status = Literal["supported", "no_effect", "refused"]
_NOTHING = (None, False, "", "no", "none", [])


@dataclass(frozen=True, slots=True)
class Key:
    """What a recipe may say about one key.

    Attributes:
        status: Whether it works, is accepted without effect, or is refused.
        annotation: The type that its value must have.
        default: LLaMA-Factory's default, or `dataclasses.MISSING`.
        note: Why it has no effect or is refused, and what to do; empty for supported keys.
    """

    status: Status
    annotation: Any
    default: Any
    note: str = ""

    def asks_for_something(self, value: Any) -> bool:
        """Whether the value says more than the default; the ways to write nothing (null, false, no) are equal."""
        return value != self.default and not (value in _NOTHING and self.default in _NOTHING)


@dataclass(frozen=True, slots=True)
class Alias:
    """An earlier transformers version's name for a present key."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value


# An alias that is false asks for nothing, so it becomes the key's default
ALIASES = {
    "evaluation_strategy": Alias("eval_strategy"),
    "no_cuda": Alias("use_cpu"),
    "per_gpu_train_batch_size": Alias("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Alias("per_device_eval_batch_size"),
    "group_by_length": Alias(
        "train_sampling_strategy",
        lambda value: ("random", "group_by_length")[value] if isinstance(value, bool) else value,
    ),
    "merger_lr": Alias("projector_lr"),  # as 2U1's trainers of other families name it
    "adafactor": Alias(
        "optim", lambda value: ("adamw_torch_fused", "adafactor")[value] if isinstance(value, bool) else value
    ),
}


_REFUSED = {
    "the engine trains with the optimizers that optim names. Delete the line and choose one there.": """
        use_galore:bool=false use_apollo:bool=false use_badam:bool=false use_adam_mini:bool=false
        optim_target_modules:str?=null""",
    "the engine trains on the plain cross-entropy of the answers. Delete the line.": """
        use_dft_loss:bool=false use_asft_loss:bool=false use_eaft_loss:bool=false
        ignore_pad_token_for_loss:bool=true""",
    "the merged model is what a run publishes, and pissa_init changes its base. Delete the line; name the run's model/ "
    "where its adapter/ was wanted.": "pissa_convert:bool=false",
    "layers are not added. Delete the line; finetuning_type: freeze trains some of those that there are.": """
        use_llama_pro:bool=false""",
    "an adapter is a folder of its own. Name that in adapter_name_or_path, and delete the line.": """
        adapter_folder:str?=null""",
    "a quantised model trains on one device. Delete the line.": "quantization_device_map:str?=null",
    "only bitsandbytes quantises here. Set quantization_method: bnb, or delete the line.": """
        quantization_method:str=bnb""",
    "the weights are trained in 16 or 32 bits. Delete the line; finetuning_type: lora with quantization_bit: 4 needs "
    "the least memory.": """
        fp8:bool=false fp16_full_eval:bool=false bf16_full_eval:bool=false""",
    "a step is transformers' own, on PyTorch. Delete the line: caches of frozen parts and logits at supervised places "
    "only are what makes it cheap here.": """
        use_unsloth:bool=false use_kt:bool=false use_mca:bool=false use_hyper_parallel:bool=false
        use_liger_kernel:bool=false""",
    "layers are compiled in PyTorch's usual way. Delete the line: torch_compile: true is enough.": """
        torch_compile_mode:str?=null""",
    "processes share the work with DDP, fsdp or deepspeed. Delete the line.": """
        accelerator_config:any=null parallelism_config:any=null tpu_num_cores:int?=null""",
    "a text that holds control tokens is refused, with its row. Delete the line.": "split_special_tokens:bool=false",
    "positions are as the model's config.json says. Set rope_parameters there, and delete the line.": """
        rope_scaling:str?=null""",
    "the model's architecture stays as it is. Delete the line.": """
        shift_attn:bool=false mixture_of_depths:str?=null train_from_scratch:bool=false upcast_layernorm:bool=false""",
    "rows are encoded once, into files below cache/rows that later runs map, and none is held in memory. Delete the "
    "line.": "tokenized_path:str?=null",
    "tools are written as the template writes them. Delete the line.": "tool_format:str?=null",
    "the batch size is part of what a run computes. Set per_device_train_batch_size.": """
        auto_find_batch_size:bool=false""",
    "nothing is uploaded by a training run. Delete the line; push the released model when you want it public.": """
        push_to_hub:bool=false export_hub_model_id:str?=null push_to_hub_model_id:str?=null""",
    "the reference is the model that the run starts from, asked once before the first step. Delete the line.": """
        ref_model:str?=null ref_model_adapters:str?=null""",
    "a pair counts by its pref_loss alone, each token alike. Delete the line.": """
        pref_bco_weight:float=0.0 ld_alpha:float?=null""",
    "secrets do not belong in a recipe. Delete it here and set the environment variable HF_TOKEN.": """
        hf_hub_token:str?=null ms_hub_token:str?=null om_hub_token:str?=null hub_token:str?=null
        push_to_hub_token:str?=null swanlab_api_key:str?=null swanlab_lark_secret:str?=null
        swanlab_lark_webhook_url:str?=null""",
}


_NO_EFFECT = {
    "a run never writes over another one; it has a directory of its own below output_dir.": """
        overwrite_output_dir:bool=false""",
    "code from a model or dataset repository is never run.": "trust_remote_code:bool=false",
    "weights are always saved as safetensors.": "save_safetensors:bool=true export_legacy_format:bool=false",
    "TensorBoard logs go to logs/ in the run's directory.": "logging_dir:str?=null",
    "the run reports to TensorBoard, and to MLflow or Weights & Biases where report_to names them; they have their own "
    "settings, such as WANDB_PROJECT.": """
        project:str=huggingface trackio_space_id:str?=null
        trackio_bucket_id:str?=null trackio_static_space_id:any=null use_swanlab:bool=false
        swanlab_project:str?=llamafactory swanlab_workspace:str?=null swanlab_run_name:str?=null
        swanlab_mode:str=cloud swanlab_logdir:str?=null""",
    "an unfinished run resumes by itself, exactly where it was.": """
        ignore_data_skip:bool=false save_only_model:bool=false restore_callback_states_from_checkpoint:bool=false
        enable_jit_checkpoint:bool=false save_on_each_node:bool=false""",
    "rows are never all in memory: they are encoded once, into files that are mapped. What is computed is the same as "
    "without the line; LLaMA-Factory would draw from a buffer of the first rows instead of from all.": """
        streaming:bool=false""",
    "rows are encoded while they are read, and nothing is cached.": """
        overwrite_cache:bool=false
        data_shared_file_system:bool=false buffer_size:int=16384 cache_dir:str?=null""",
    "evaluation entries are always evaluated at the end. Training measures their loss, and of answers what "
    "metric_for_best_model names, such as label_accuracy.": """
        do_eval:bool=false compute_accuracy:bool=false prediction_loss_only:bool=false
        eval_accumulation_steps:int?=null eval_do_concat_batches:bool=true eval_use_gather_object:bool=false
        batch_eval_metrics:bool=false include_for_metrics:any=null include_inputs_for_metrics:bool=false
        label_names:any=null use_legacy_prediction_loop:bool=false""",
    "answers are made by transformers: greedily for predictions, as asked by mllm-assets generate, chat and serve. A "
    "release is a plain directory that vLLM and SGLang read.": """
        do_predict:bool=false predict_with_generate:bool=false generation_max_length:int?=null
        generation_num_beams:int?=null generation_config:any=null eval_num_beams:int?=null sortish_sampler:bool=false
        do_sample:bool=true temperature:float=0.95 top_p:float=0.7 top_k:int=50 num_beams:int=1 max_length:int=1024
        max_new_tokens:int=1024 repetition_penalty:float=1.0 length_penalty:float=1.0 skip_special_tokens:bool=true
        infer_backend:str=huggingface infer_dtype:str=auto use_kv_cache:bool=true""",
    "checkpointing follows disable_gradient_checkpointing; the variants compute the same.": """
        gradient_checkpointing:bool?=null gradient_checkpointing_kwargs:any=null activation_checkpointing:bool?=null
        activation_checkpointing_kwargs:any=null use_reentrant_gc:bool=true use_unsloth_gc:bool=false""",
    "the loss of a step is the mean over its batches, as in LLaMA-Factory.": """
        average_tokens_across_devices:bool=true""",
    "logits are computed where there is a label only, in 32 bits.": "upcast_lmhead_output:bool=false",
    "enable_liger_kernel takes all of Liger's kernels for the text layers, and the loss is this engine's own.": """
        liger_kernel_config:any=null""",
    "the run reports this in its own way: bar, trainer_log.jsonl, TensorBoard, metadata of the asset.": """
        disable_tqdm:bool?=null log_level:str=passive log_level_replica:str=warning log_on_each_node:bool=true
        logging_nan_inf_filter:bool=true include_num_input_tokens_seen:any=no include_tokens_per_second:bool=false
        include_effective_tokens_per_second:bool=false skip_memory_metrics:bool=true print_param_status:bool=false
        debug:any= enable_torch_profiler:bool=false profiler_output_dir:str?=null profiler_wait_steps:int=1
        profiler_warmup_steps:int=1 profiler_active_steps:int=1 profiler_repeat:int=1
        profiler_record_shapes:bool=true profiler_profile_memory:bool=true profiler_with_stack:bool=true
        profile_modules:str?=null tpu_metrics_debug:bool=false""",
    "the launcher decides over processes and machines.": """
        local_rank:int=-1 ray_num_workers:int=1 ray_init_kwargs:any=null ray_scope:str?=last master_addr:str?=null
        master_port:str?=null ddp_broadcast_buffers:bool?=null ddp_static_graph:bool?=null use_mps_device:bool=false
        dispatch_batches:bool?=null split_batches:bool?=null mp_parameters:str=""",
    "memory and loading are left to PyTorch and transformers.": """
        torch_empty_cache_steps:int?=null low_cpu_mem_usage:bool=true offload_folder:str=offload
        dataloader_multiprocessing_context:str?=null dataloader_in_order:bool=true use_fast_tokenizer:bool=true
        use_v1_kernels:bool?=false use_cache:bool=false jit_mode_eval:bool=false use_ipex:bool=false
        half_precision_backend:str=auto fp16_backend:str=auto fp16_opt_level:str=O1 past_index:int=-1
        torchdynamo:str?=null remove_unused_columns:bool=true length_column_name:str=length""",
    "LLaMA-Factory 0.9.5 reads lora_target with finetuning_type: oft too, and so do runs here. Name modules there.": """
        oft_target:str=all""",
    "adapters are on linear layers, none on an embedding.": "loraplus_lr_embedding:float=1e-6",
    "the pretrained asset pins the revision.": "model_revision:str=main",
    "it belongs to a switch that is off.": """
        ref_model_quantization_bit:int?=null
        hyper_parallel_args:str?=null fp8_backend:str=auto
        fp8_enable_fsdp_float8_all_gather:bool=false
        asft_alpha:float=0.1 eaft_alpha:float=1.0 moe_aux_loss_coef:float?=null
        kt_weight_path:str?=null
        kt_expert_checkpoint_path:str?=null kt_use_lora_experts:bool?=null kt_lora_expert_num:int?=null
        kt_lora_expert_intermediate_size:int?=null galore_target:str=all galore_rank:int=16
        galore_update_interval:int=200 galore_scale:float=2.0 galore_proj_type:str=std
        galore_layerwise:bool=false apollo_target:str=all
        apollo_rank:int=16 apollo_update_interval:int=200 apollo_scale:float=32.0 apollo_proj:str=random
        apollo_proj_type:str=std apollo_scale_type:str=channel apollo_layerwise:bool=false
        apollo_scale_front:bool=false badam_mode:str=layer badam_start_block:int?=null
        badam_switch_mode:str?=ascending badam_switch_interval:int?=50 badam_update_ratio:float=0.05
        badam_mask_mode:str=adjacent badam_verbose:int=0 fsdp_min_num_params:int=0
        fsdp_transformer_layer_cls_to_wrap:str?=null hub_private_repo:bool?=null hub_model_id:str?=null
        hub_strategy:str=every_save hub_always_push:bool=false hub_revision:str?=null
        push_to_hub_organization:str?=null""",
    "it belongs to another training stage.": """
        ppo_buffer_size:int=1 ppo_epochs:int=4 ppo_score_norm:bool=false ppo_target:float=6.0
        ppo_whiten_rewards:bool=false
        reward_model:str?=null reward_model_adapters:str?=null reward_model_quantization_bit:int?=null
        reward_model_type:str=lora""",
    "rows hold images, videos without their sound, and text.": """
        use_audio_in_video:bool=false audio_sampling_rate:int=16000""",
    "exporting and serving are not part of training.": """
        export_dir:str?=null export_size:int=5 export_device:str=cpu export_quantization_bit:int?=null
        export_quantization_dataset:str?=null export_quantization_nsamples:int=128
        export_quantization_maxlen:int=1024 vllm_maxlen:int=4096 vllm_gpu_util:float=0.7
        vllm_enforce_eager:bool=false vllm_max_lora_rank:int=32 vllm_config:any=null sglang_maxlen:int=4096
        sglang_mem_fraction:float=0.7 sglang_tp_size:int=-1 sglang_config:any=null sglang_lora_backend:str=triton""",
}


_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "any": Any}


def _parse(status: Status, groups: dict[str, str]) -> Iterator[tuple[str, Key]]:
    for note, names in groups.items():
        for item in names.split():
            name, _, rest = item.partition(":")
            kind, _, default = rest.partition("=")
            annotation = _TYPES[kind.removesuffix("?")]
            is_text = annotation in (str, Any) and default != "null"
            yield (
                name,
                Key(
                    status,
                    annotation | None if kind.endswith("?") else annotation,
                    default if is_text else json.loads(default),
                    note,
                ),
            )


_annotations = typing.get_type_hints(TrainSpec)
KEYS: dict[str, Key] = {
    **dict(_parse("refused", _REFUSED)),
    **dict(_parse("no_effect", _NO_EFFECT)),
    **{f.name: Key("supported", _annotations[f.name], f.default) for f in dataclasses.fields(TrainSpec)},
}


def value_advice(name: str, value: Any) -> str:
    """What to write where a key cannot have a value that LLaMA-Factory knows."""
    text = str(value).lower()
    if name == "optim" and ("8bit" in text or "paged" in text):
        return "Set optim: adamw_8bit, or paged_adamw_8bit, which moves states off a full GPU."
    if name == "optim" and isinstance(value, str):
        return "Set optim: adamw_torch_fused, LLaMA-Factory's default."
    if name == "stage":
        return (
            "Set stage: sft for answers to learn, dpo for pairs of which one is preferred, kto for marked "
            "answers, rm for a reward model of pairs, grpo for the model's own answers with a reward."
        )
    if name == "pref_loss":
        return "Set pref_loss: sigmoid, which LLaMA-Factory 0.9.5 computes for hinge, ipo and kto_pair as well."
    if name == "loss_type":
        return "Set loss_type: bnpo, which is TRL's dapo where a step is one batch."
    if name == "flash_attn" and text == "fa3":
        return "Set flash_attn: fa2, or auto."
    return "Change the value."


def ineffective_notes(spec: TrainSpec, written: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each written key that the recipe's other keys leave without effect."""
    for key, why in _reasons(spec):
        if key in written:
            yield f"{key} has no effect: {why}."


def repeated_notes(spec: TrainSpec) -> Iterator[str]:
    """Yield a sentence for each entry that is in its list more than once, which LLaMA-Factory accepts as well."""
    for key, names in (("dataset", spec.train_entries), ("eval_dataset", spec.eval_entries)):
        for name, count in Counter(names).items():
            if count > 1:
                yield f"{key} names {name} {count} times: each of its rows is read {count} times."


def _reasons(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    yield from spec.idle_keys.items()
    if spec.adds_adapters and not spec.freeze_multi_modal_projector and not spec.additional_target:
        why = f"{'LoRA' if spec.finetuning_type == 'lora' else 'OFT'} trains adapters only, and the projector gets none"
        yield "freeze_multi_modal_projector", f"{why}; additional_target names modules that train whole"
    if spec.use_muon:
        for key in ("optim", "optim_args"):
            yield key, "use_muon is set and wins"
    if spec.freeze_vision_tower:
        yield "vision_lr", "freeze_vision_tower is true, so nothing of the tower trains"
    if not (spec.additional_target if spec.adds_adapters else not spec.freeze_multi_modal_projector):
        yield "projector_lr", "the projector does not train"
    if not spec.packs and not spec.learns_marks:
        for key in ("preprocessing_num_workers", "preprocessing_batch_size"):
            yield key, "rows are encoded while they are read, and nothing is cached"
    if len(spec.train_entries) == 1 and len(spec.eval_entries) < 2:
        for key in ("mix_strategy", "interleave_probs"):
            yield key, "there is one entry, and nothing to mix"
    if spec.max_steps > 0:
        yield "num_train_epochs", "max_steps is set and wins"
    if spec.disable_shuffling and spec.train_sampling_strategy != "random":
        yield "train_sampling_strategy", "disable_shuffling is set and wins"
    for kind in ("eval", "save", "logging"):
        strategy = getattr(spec, f"{kind}_strategy")
        if strategy != "steps":
            yield f"{kind}_steps", f"{kind}_strategy is {strategy}"
    if spec.eval_strategy == "no":
        for key in ("per_device_eval_batch_size", "eval_delay", "eval_on_start"):
            yield key, "eval_strategy is no, so nothing is evaluated while training"
        if spec.val_size:
            yield "val_size", "eval_strategy is no: its rows are held out all the same, and not evaluated"
    if not spec.eval_entries or spec.eval_strategy == "no":
        yield "eval_on_each_dataset", "no eval_dataset is evaluated while training"
    if not spec.evaluation_selects:
        for key in ("greater_is_better",) if spec.measures_answers else ("metric_for_best_model", "greater_is_better"):
            yield key, "evaluation does not choose the weights"
    if TEMPLATES[spec.template].thought is None:
        for key in ("enable_thinking", "preserve_thinking"):
            yield key, f"the template {spec.template} has no place for reasoning"
    elif not spec.mask_history:
        yield "preserve_thinking", "no history is masked, so all reasoning stays"
