"""How predictions are made, as a recipe's settings say it."""

from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.asking import VIDEO_KEYS, Sampling, TurnSettings
from mllm_assets.recipe.spec import TrainSpec

ROWS_AT_ONCE = 16  # that a model is asked about, where nobody says; see `inference.batch_size` for a GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How predictions are made.

    Attributes:
        max_new_tokens: Tokens after which an answer is cut.
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Of the drawing.
        top_p: Draw from the likeliest tokens that together have this share.
        seed: Of the drawing.
        batch_size: Samples that are asked at once; 16 by default, and 64 where a GPU's memory holds them and no token
            is drawn. Halved where they do not fit.
        max_samples: Samples of each entry to use, spread evenly over it; all by default.
        unrelated: Entries that have nothing to do with the training, on which it is measured what the model forgot;
            `plain_questions` ships with the package.
        backend: Address of a server that speaks OpenAI's protocol, such as vLLM's http://127.0.0.1:8000/v1, which
            serves the tuned model and answers in its place; losses are computed here all the same.
        backend_model: The model's name there; by default the only one.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int | None = None
    max_samples: int | None = None
    unrelated: tuple[str, ...] = ()
    backend: str | None = None
    backend_model: str | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"evaluation.temperature is {self.temperature}: expected a number above 0. Change it.")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"evaluation.top_p is {self.top_p}: expected a share above 0, at most 1. Change it.")
        if self.backend is not None:
            _require_address(self.backend)
            if self.do_sample:
                raise RecipeError(
                    "evaluation.do_sample draws tokens by this machine's seed, which a backend does not know. Delete "
                    "it, or delete evaluation.backend."
                )

    def sampling(self, seed: int) -> Sampling:
        """How the answers of one batch are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )

    def conditions(self, recipe: TrainSpec) -> dict[str, Any]:
        """Everything that answers depend on except models and data."""
        names = ("cutoff_len", "image_max_pixels", "image_min_pixels", "template", "enable_thinking")
        asked = {name: getattr(recipe, name) for name in names}
        if recipe.default_system is not None:
            asked["default_system"] = recipe.default_system
        asked |= dict.fromkeys(recipe.turns.crop_keys, True)
        defaults = TurnSettings()
        asked |= {n: v for n in VIDEO_KEYS if (v := getattr(recipe, n)) != getattr(defaults, n)}
        if self.max_samples is not None:
            asked["chosen"] = "spread"  # those made before were of an entry's first rows
        # the same names whatever a GPU holds: its answers are those of other batches to rounding
        return {**asked, **self.identity(), "batch_size": self.batch_size or ROWS_AT_ONCE}

    def identity(self) -> dict[str, Any]:
        """The values by which predictions are named; without those that came later where they are not set."""
        later = ("unrelated", "backend", "backend_model")
        return {name: value for name, value in asdict(self).items() if name not in later or value}


def _require_address(text: str) -> None:
    """Refuse what is no address, or has a password in it.

    Raises:
        RecipeError: Says which.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError("evaluation.backend is not an address: expected for example http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None or parts.query:
        raise RecipeError(
            "evaluation.backend holds more than an address. Put the server's key into the variable MLLM_ASSETS_API_KEY."
        )
