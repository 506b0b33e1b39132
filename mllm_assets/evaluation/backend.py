"""Predictions whose answers a server gives, such as vLLM with the tuned model, once it was compared with the model."""

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import MachineError
from mllm_assets.evaluation.agreement import Agreement
from mllm_assets.evaluation.same_answers import Loaded, compare
from mllm_assets.evaluation.samples import Samples, spread
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.batches import Pass
from mllm_assets.worker.tasks import EvaluateTask, EvaluationSettings, Part

if TYPE_CHECKING:
    pass

NUM_COMPARED = 16
AT_ONCE = 16  # requests; such servers answer many together
MAX_RETRIES = 5  # of a request that failed in passing, later each time


def backend_of(task: EvaluateTask, model: str, answerer: Answerer, samples: Samples) -> "Backend | None":
    """The server that answers in place of one of a task's models, where there is one; it was compared with the model.

    Raises:
        MachineError: The client's library is missing, the server does not answer, or does not answer like the model.
    """
    if task.settings.backend is None or model != "tuned" or task.recipe.learns_scores:
        return None
    if importlib.util.find_spec("openai") is None:
        raise MachineError("evaluation.backend needs openai, which is missing: pip install 'mllm-assets[serve]'")
    return Backend(task.settings, task.settings.backend, answerer, samples)


class Backend:
    """A server that answers in a model's place, about samples.

    Attributes:
        said: Who answers, and how alike the answers were.
    """

    def __init__(self, settings: EvaluationSettings, url: str, answerer: Answerer, samples: Samples) -> None:
        from mllm_assets.evaluation.served import Served, connect

        self._settings, self._answerer, self._samples = settings, answerer, samples
        client = connect(url, max_retries=MAX_RETRIES)
        self._served: Served = Served(client, settings.backend_model, answerer.encoder.turns.system)
        rows = list(_spread_rows(samples))
        asked_for = Agreement(max_samples=NUM_COMPARED, max_new_tokens=settings.max_new_tokens)
        found = compare(Loaded(answerer, scores=False), self._served, rows, asked_for)
        if not found.passed:
            raise MachineError(
                f"{url} does not answer like the model that is evaluated, so it is not asked.\n"
                f"{found.describe()}\nServe that model, or delete evaluation.backend."
            )
        self.said = f"{self._served.name} at {url}; {found.agreement:.0%} of {len(rows)} answers were the model's own"

    def asked(self, one: Pass, part: Part) -> Iterator[tuple[Pass, list[int], list[tuple[Any, ...]]]]:
        """Yield the answers to a part's rows that are not known, as `in_batches` does.

        Raises:
            MachineError: The server does not answer, or refuses.
            DataError: A row cannot be asked.
        """
        wanted = {position for positions in one.batches(part) for position in positions}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for chunk in _chunks(self._samples, wanted):
                yield one, [number for number, _ in chunk], list(pool.map(self._answer, [row for _, row in chunk]))

    def _answer(self, row: Row) -> tuple[str, int, float]:
        told = self._served.ask(row, self._settings.max_new_tokens)
        num_tokens = told.num_tokens
        if num_tokens is None:
            num_tokens = len(self._answerer.tokenizer.encode(told.text, add_special_tokens=False))
        return told.text.strip(), num_tokens, told.wall_s


def _spread_rows(samples: Samples) -> Iterator[Row]:
    first = samples.entries[0]
    wanted = set(spread(len(first), NUM_COMPARED))
    return (parse() for number, parse in enumerate(first.unparsed()) if number in wanted)


def _chunks(samples: Samples, wanted: Collection[int]) -> Iterator[Sequence[tuple[int, Row]]]:
    chunk = []
    for number, (_, _, row) in enumerate(samples):
        if number in wanted:
            chunk.append((number, row))
        if len(chunk) == AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
