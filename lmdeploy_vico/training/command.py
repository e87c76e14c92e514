"""From the options of ``lmdeploy-vico train`` to a run."""

import argparse
import os
import sys

from rich.console import Console

from lmdeploy_vico.training import CommonError, TrainingError
from lmdeploy_vico.training.cost.dry_run import dry_run
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import Pace, Schedule, require_possible
from lmdeploy_vico.training.model.adapters import require_rank
from lmdeploy_vico.training.stages import consistency, router

WIDTH = 140  # columns of a table that goes into a file


def train(arguments: argparse.Namespace, stage: str) -> None:
    """Run the stage ``consistency`` or ``router``.

    One of several processes does not return from a run that is complete.

    Raises:
        TrainingError, UnsupportedCheckpointError: the run cannot begin or go on.
        SystemExit: it cannot, all processes know why, and the first of several has said it.
    """
    processes = Processes()
    console = Console(stderr=True)
    pace = Pace(arguments.micro_batch, arguments.workers, arguments.save_every, arguments.log_every)
    try:
        make(arguments, stage, pace, processes, console).run()
    except CommonError as error:
        if processes.size == 1:
            raise
        if processes.first:
            console.print(f'lmdeploy-vico: {error}', markup=False, highlight=False, soft_wrap=True)
        processes.wait()  # torchrun ends all of them as soon as one has ended
        raise SystemExit(1) from error
    finally:
        processes.close()
    if processes.first:
        console.print(f'Written: {arguments.output}. Serve it: lmdeploy serve api_server {arguments.output}')
    if processes.size > 1:
        leave()


def leave() -> None:
    """End this process, one of several whose run is complete, without the interpreter's own end.

    There threads of PyTorch's process groups now and then abort it ("terminate called without an active exception"),
    and torchrun would report a run as failed whose checkpoint is whole.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def estimate(arguments: argparse.Namespace, stage: str) -> None:
    """Print what a run of the stage would cost; raises TrainingError."""
    dry_run(arguments, stage, Console(width=None if sys.stdout.isatty() else WIDTH))


def make(
    arguments: argparse.Namespace, stage: str, pace: Pace, processes: Processes, console: Console
) -> consistency.ConsistencyTraining | router.RouterTraining:
    """The run that is asked for; raises TrainingError before anything is read if it cannot be made."""
    if min(arguments.seed, arguments.max_tiles - 1, arguments.max_length - 1) < 0:
        raise TrainingError('--seed must be 0 or more, --max-tiles and --max-length 1 or more.')
    if stage == 'router':
        settings = router_settings(arguments)
        require_possible([settings.schedule], pace, processes.size)
        return router.RouterTraining(settings, pace, arguments.output, processes, console)
    asked = consistency_settings(arguments)
    require_possible([asked.warm_up, asked.main], pace, processes.size)
    return consistency.ConsistencyTraining(asked, pace, arguments.output, processes, console)


def consistency_settings(arguments: argparse.Namespace) -> consistency.Settings:
    """The settings of consistency training; raises TrainingError where two options do not go together."""
    require_rank(arguments.lora_rank)
    if arguments.reference is None and not arguments.lora_rank:
        raise TrainingError('train consistency needs --reference, or --lora-rank, which makes the model its own.')
    schedule = main_schedule(arguments)
    return consistency.Settings(
        model=arguments.model,
        reference=arguments.model if arguments.lora_rank else arguments.reference,
        data=arguments.data,
        held_out=arguments.held_out,
        warm_up=warm_up_schedule(arguments),
        main=schedule,
        parts=arguments.train,
        lora_rank=arguments.lora_rank,
        max_tiles=arguments.max_tiles,
        max_length=arguments.max_length,
        seed=arguments.seed,
    )


def router_settings(arguments: argparse.Namespace) -> router.Settings:
    """The settings of router training; raises TrainingError where the reference is missing."""
    if arguments.reference is None:
        raise TrainingError('train router needs --reference.')
    return router.Settings(
        model=arguments.model,
        reference=arguments.reference,
        data=arguments.data,
        held_out=arguments.held_out,
        schedule=main_schedule(arguments),
        percentile=arguments.percentile,
        window=arguments.window,
        epsilon=arguments.epsilon,
        relative_threshold=arguments.relative_threshold,
        absolute_threshold=arguments.absolute_threshold,
        compress=arguments.compress,
        max_tiles=arguments.max_tiles,
        max_length=arguments.max_length,
        seed=arguments.seed,
    )


def main_schedule(arguments: argparse.Namespace) -> Schedule:
    """The schedule of a stage."""
    return Schedule(
        arguments.steps, arguments.batch, arguments.rate, arguments.least_rate, weight_decay=arguments.weight_decay
    )


def warm_up_schedule(arguments: argparse.Namespace) -> Schedule:
    """The schedule of mlp2's warm-up: a fifth of it rises, the rest falls to a tenth."""
    steps, rate = arguments.warm_up_steps, arguments.warm_up_rate
    return Schedule(steps, arguments.batch, rate, rate / 10, rise=steps // 5, weight_decay=arguments.weight_decay)
