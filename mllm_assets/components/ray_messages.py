"""Dagster Pipes messages out of a Ray job's log. Imported only where a job is submitted: it needs the extra `ray`."""

from dagster import PipesMessageHandler
from dagster._core.errors import DagsterPipesExecutionError
from dagster_ray import PipesRayJobMessageReader


class RayMessageReader(PipesRayJobMessageReader):
    """dagster-ray's reader, for which a log that does not end is no failure of the step.

    A job that never got room has such a log; what a job computed does not come through the log.
    """

    def terminate(self, handler: PipesMessageHandler) -> None:
        try:
            super().terminate(handler)
        except DagsterPipesExecutionError:
            handler._context.log.warning("The end of the Ray job's log was not read.")
