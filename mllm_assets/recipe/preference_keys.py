"""`PreferenceKeys`: how preferences are learnt, from pairs or marked answers, by LLaMA-Factory's names and defaults."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mllm_assets.recipe.method_keys import ADDED
from mllm_assets.recipe.reward_keys import NOT_FOR_COMPARED, RewardKeys

PAIR_KEYS = ("pref_loss", "dpo_label_smoothing", "simpo_gamma")
MARK_KEYS = ("kto_chosen_weight", "kto_rejected_weight")
PREFERENCE_KEYS = ("pref_beta", "pref_ftx")  # of both


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceKeys(RewardKeys):
    """`stage: dpo`, `kto` or `rm`, and how an answer that is preferred pulls."""

    pref_beta: float = field(default=0.1, metadata=ADDED)
    pref_loss: Literal["sigmoid", "orpo", "simpo"] = field(default="sigmoid", metadata=ADDED)
    pref_ftx: float = field(default=0.0, metadata=ADDED)
    dpo_label_smoothing: float = field(default=0.0, metadata=ADDED)
    simpo_gamma: float = field(default=0.5, metadata=ADDED)
    kto_chosen_weight: float = field(default=1.0, metadata=ADDED)
    kto_rejected_weight: float = field(default=1.0, metadata=ADDED)

    @property
    def learns_pairs(self) -> bool:
        """Whether a sample is a preferred answer and a rejected one."""
        return self.stage in ("dpo", "rm")

    @property
    def learns_scores(self) -> bool:
        """Whether a head is trained that scores answers: a reward model."""
        return self.stage == "rm"

    @property
    def learns_marks(self) -> bool:
        """Whether a sample is an answer that is marked good or bad."""
        return self.stage == "kto"

    @property
    def learns_preferences(self) -> bool:
        """Whether answers are compared, not learnt alone."""
        return self.learns_pairs or self.learns_marks

    @property
    def sequences_of_a_row(self) -> int:
        """How many sequences the model reads of a row at once."""
        return self.num_generations if self.learns_rewards else 2 if self.learns_pairs else 1

    @property
    def copies_answers(self) -> bool:
        """Whether the rows' answers are what is learnt."""
        return not self.learns_preferences and not self.learns_rewards

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model that the run starts from."""
        return self.learns_marks or (self.stage == "dpo" and self.pref_loss not in ("orpo", "simpo"))

    @property
    def averages_tokens(self) -> bool:
        """Whether an answer counts by the mean over its tokens, not by their sum."""
        return self.pref_loss in ("orpo", "simpo")

    @property
    def idle_keys(self) -> dict[str, str]:
        """The keys that the others leave without effect, each with the reason."""
        idle = self.idle_method_keys | self.idle_vocabulary_keys | self.idle_reward_keys
        if self.stage != "dpo":
            idle |= dict.fromkeys(PAIR_KEYS, f"stage is {self.stage}, not dpo")
        if not self.learns_marks:
            idle |= dict.fromkeys(MARK_KEYS, f"stage is {self.stage}, not kto")
        if not self.learns_preferences or self.learns_scores:
            idle |= dict.fromkeys(PREFERENCE_KEYS, f"stage is {self.stage}, not dpo or kto")
        if not self.learns_preferences:
            return idle
        if self.stage == "dpo" and self.pref_loss != "simpo":
            idle["simpo_gamma"] = f"pref_loss is {self.pref_loss}, not simpo"
        why = f"stage is {self.stage}, where nothing is dropped: answers are compared with the reference"
        if not self.learns_scores:
            idle["lora_dropout"] = why
        return idle | dict.fromkeys(
            ("train_on_prompt", "mask_history"), f"stage is {self.stage}, which learns last answers only"
        )


def preference_problems(spec: PreferenceKeys) -> Iterator[tuple[str, str]]:
    """Yield each key that is wrong, or does not go with learning preferences, and a sentence about it."""
    if spec.pref_beta <= 0:
        yield "pref_beta", f"pref_beta is {spec.pref_beta}: expected a number above 0. Change it or delete the line."
    for key in ("pref_ftx", "simpo_gamma", *MARK_KEYS):
        if getattr(spec, key) < 0:
            yield key, f"{key} is {getattr(spec, key)}: expected 0 or more. Change it or delete the line."
    if not 0 <= spec.dpo_label_smoothing < 0.5:
        text = f"dpo_label_smoothing is {spec.dpo_label_smoothing}: expected 0 or more and below 0.5."
        yield "dpo_label_smoothing", f"{text} Change it or delete the line."
    if not spec.learns_preferences:
        return
    if spec.stage == "dpo" and spec.dpo_label_smoothing and spec.pref_loss != "sigmoid":
        text = (
            f"dpo_label_smoothing is of pref_loss: sigmoid, and pref_loss is {spec.pref_loss}. Delete one of the two."
        )
        yield "dpo_label_smoothing", text
    for key in NOT_FOR_COMPARED:
        if getattr(spec, key):
            yield key, f"{key} is for stage: sft, and stage is {spec.stage}. Delete the line."
    if spec.pissa_init and spec.has_reference:
        text = (
            f"pissa_init changes the base, and the reference of stage: {spec.stage} is the base without its adapters."
        )
        yield "pissa_init", f"{text} Delete the line."
