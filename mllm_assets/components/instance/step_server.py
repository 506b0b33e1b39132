"""Imported by a run's fork server: builds the definitions before the first step is forked from it."""

import os
from contextlib import suppress

import dagster as dg
from dagster._core.code_pointer import CodePointer
from dagster._core.definitions.reconstruct import ReconstructableRepository

from mllm_assets.components.instance.step_forks import POINTER

with suppress(Exception):  # the step builds them again, and says what is wrong
    pointer = dg.deserialize_value(os.environ[POINTER])
    assert isinstance(pointer, CodePointer)
    ReconstructableRepository(pointer).get_definition().get_all_jobs()
