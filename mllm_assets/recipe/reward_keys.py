"""`RewardKeys`: what a sample is, and how answers are rewarded, by the names and defaults of TRL's `GRPOConfig`.

LLaMA-Factory 0.9.5 has no `stage: grpo`. `reward` is this project's: metrics of answers by name, each with its weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_assets.recipe.answer_metrics import rewarding_metrics
from mllm_assets.recipe.method_keys import ADDED
from mllm_assets.recipe.vocabulary_keys import VocabularyKeys

REWARD_KEYS = ("reward", "num_generations", "max_completion_length", "beta", "loss_type", "scale_rewards")
NOT_FOR_COMPARED = (
    "packing", "neat_packing", "label_smoothing_factor", "neftune_noise_alpha", "fsdp", "deepspeed", "torch_compile",
)  # fmt: skip
UNTRIED_WITH_REWARDS = ("quantization_bit", "enable_liger_kernel")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardKeys(VocabularyKeys):
    """The stage, and of `stage: grpo` what answers are worth and how many are drawn."""

    stage: Literal["sft", "dpo", "kto", "rm", "grpo"] = field(default="sft", metadata=ADDED)
    reward: dict[str, Any] | None = field(default=None, metadata=ADDED)  # weights of metrics, by their names
    num_generations: int = field(default=8, metadata=ADDED)
    max_completion_length: int = field(default=256, metadata=ADDED)
    beta: float = field(default=0.0, metadata=ADDED)
    loss_type: Literal["bnpo", "grpo", "dr_grpo"] = field(default="bnpo", metadata=ADDED)
    scale_rewards: Literal["group", "batch", "none"] = field(default="group", metadata=ADDED)

    @property
    def learns_rewards(self) -> bool:
        """Whether the model's own answers are rewarded."""
        return self.stage == "grpo"

    @property
    def idle_reward_keys(self) -> dict[str, str]:
        """The keys that the others leave without effect, each with the reason."""
        if not self.learns_rewards:
            return dict.fromkeys(REWARD_KEYS, f"stage is {self.stage}, not grpo")
        idle = dict.fromkeys(
            ("train_on_prompt", "mask_history"), "stage is grpo, which learns the model's own last answers only"
        )
        return idle | {"lora_dropout": "stage is grpo, where nothing is dropped: answers are learnt as they are drawn"}


def reward_problems(spec: RewardKeys) -> Iterator[tuple[str, str]]:
    """Yield each key that is wrong, or does not go with learning rewards, and a sentence about it."""
    if spec.num_generations < 2:
        text = f"num_generations is {spec.num_generations}: expected 2 or more, for answers are compared."
        yield "num_generations", f"{text} Change it or delete the line."
    if spec.max_completion_length < 1:
        text = f"max_completion_length is {spec.max_completion_length}: expected 1 or more."
        yield "max_completion_length", f"{text} Change it or delete the line."
    if spec.beta < 0:
        yield "beta", f"beta is {spec.beta}: expected 0 or more. Change it or delete the line."
    if not spec.learns_rewards:
        return
    yield from _weight_problems(spec.reward)
    for key in NOT_FOR_COMPARED:
        if getattr(spec, key):
            yield key, f"{key} is for stage: sft, and stage is grpo. Delete the line."
    for key in UNTRIED_WITH_REWARDS:
        if getattr(spec, key):
            yield key, f"{key} together with stage: grpo has not been tried. Delete the line."


def _weight_problems(reward: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if not reward:
        text = "stage: grpo needs a reward. Add a line with metrics and their weights, such as"
        yield "reward", f"{text} reward: {{label_accuracy: 1.0}}."
        return
    known = rewarding_metrics()
    for name, weight in reward.items():
        if name not in known:
            text = f"reward names {name!r}: expected of {', '.join(known)}, which have a value for each answer."
            yield "reward", f"{text} Correct it."
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not weight:
            yield "reward", f"reward: {name} is {weight!r}: expected a number that is not 0. Correct it."
        elif (weight > 0) != known[name]:
            found, sign = ("more", "above") if known[name] else ("less", "below")
            yield "reward", f"reward: {name} is {weight}, and {found} of it is better. Give it a weight {sign} 0."
