"""`VocabularyKeys`: tokens that a model gets before it trains, by LLaMA-Factory's names and defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_assets.recipe.method_keys import ADDED, MethodKeys, split_names

TOKENS_IN_TEXTS = "tokens_in_texts"  # of tokenizer_config.json: special tokens that a recipe added for its rows
NOT_WITH_NEW_TOKENS = ("quantization_bit", "adapter_name_or_path", "fsdp", "deepspeed")


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyKeys(MethodKeys):
    """New tokens, and how their embeddings begin; `seed` decides over the draws."""

    resize_vocab: bool = field(default=False, metadata=ADDED)
    add_tokens: str | None = field(default=None, metadata=ADDED)
    add_special_tokens: str | None = field(default=None, metadata=ADDED)
    # a file of token and description; its content once `with_config_files` has read it
    new_special_tokens_config: dict[str, Any] | str | None = field(default=None, metadata=ADDED)
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = field(
        default="noise_init", metadata=ADDED
    )

    @property
    def plain_tokens(self) -> tuple[str, ...]:
        """Tokens to add that are words like others."""
        return split_names(self.add_tokens)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens to add that no text is split before or after otherwise."""
        return tuple(self.token_descriptions) or split_names(self.add_special_tokens)

    @property
    def token_descriptions(self) -> Mapping[str, str]:
        """What special tokens mean, in words that the model knows."""
        return self.new_special_tokens_config if isinstance(self.new_special_tokens_config, dict) else {}

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the model that trains has other tokens, or more rows for them, than `model_name_or_path`."""
        return bool(self.resize_vocab or self.add_tokens or self.add_special_tokens or self.new_special_tokens_config)

    @property
    def idle_vocabulary_keys(self) -> dict[str, str]:
        """The keys that the others leave without effect, each with the reason."""
        idle = {}
        if self.new_special_tokens_config:
            idle["add_special_tokens"] = "new_special_tokens_config names the tokens"
        else:
            idle["init_special_tokens"] = "there is no new_special_tokens_config, which describes tokens"
        return idle


def vocabulary_problems(spec: VocabularyKeys) -> Iterator[tuple[str, str]]:
    """Yield each key that does not go with new tokens, and a sentence about it."""
    for token, text in spec.token_descriptions.items():
        if not token.strip() or not isinstance(text, str) or not text.strip():
            text = f"new_special_tokens_config: expected lines of `token: description`, found {token!r}: {text!r}."
            yield "new_special_tokens_config", f"{text} Correct it."
    if not spec.changes_vocabulary:
        return
    for key in NOT_WITH_NEW_TOKENS:
        if getattr(spec, key):
            text = f"{key} together with new tokens has not been tried. Add the tokens in a run without it, and name"
            yield key, f"{text} its model/ in model_name_or_path."
