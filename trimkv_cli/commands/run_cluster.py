"""Workers of a Ray cluster for `trimkv run`: what each of them loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from trimkv_cli.commands.run_settings import ClusterChoices
from trimkv_cli.commands.run_work import as_before, facts_of
from trimkv_cli.engine.options import EngineOptions
from trimkv_cli.jobs.backend import Backend, BackendFacts

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


def open_cluster(cluster: ClusterChoices, options: EngineOptions) -> Backend:
    """Join a cluster, or start one here, and load an engine in each worker.

    Raises:
        TrimkvError: there is no cluster, or the first worker cannot load.
    """
    from trimkv_cli.jobs.cluster import ClusterOptions, RayBackend

    place = ClusterOptions(address=cluster.address, cpus_per_worker=cluster.cpus_per_worker)
    return RayBackend(partial(load_for_worker, options), place)


def load_for_worker(
    options: EngineOptions, threads: int | None, sizes: Mapping[str, str] | None
) -> tuple[Engine, BackendFacts]:
    """Load an engine in a worker, which has `threads` CPUs to itself; `sizes` is the fingerprint of the first one."""
    from trimkv_cli.engine.loader import load_engine

    options = options if options.threads or threads is None else replace(options, threads=threads)
    engine = load_engine(options if sizes is None else as_before(options, sizes))
    return engine, facts_of(engine)
