"""The training run, from top to bottom."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.buckets import absolute
from instdiff_jax.checkpoint.verify import signed
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from instdiff_jax.files import remove_leftovers, write_json
from instdiff_jax.locks import lock_folder
from instdiff_jax.parallel.failures import end_together
from instdiff_jax.parallel.mesh import (
    ParallelSettings,
    check_batch,
    first_process_decides,
    initialize_distributed,
    make_mesh,
)
from instdiff_jax.parallel.runtime import enable_compilation_cache
from instdiff_jax.training.checkpoints import Checkpoints, StopSignal
from instdiff_jax.training.goodput import Goodput, line_at
from instdiff_jax.training.inputs import open_inputs, open_tokenizer
from instdiff_jax.training.memory import compile_measured
from instdiff_jax.training.metrics import Clock, MetricsWriter, ProfilerWindow, Reporter
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.start import run_facts, start_params
from instdiff_jax.training.state import Params, ShardingPlan, TrainState, init_state, make_sharding_plan
from instdiff_jax.training.step import compile_step, make_train_step
from instdiff_jax.training.validation import SampleGrid, Validation, check_validation, validates
from instdiff_jax.training.wandb_run import WandbRun, check_wandb


def train(run: RunSettings, workdir: Path) -> str:
    """Trains until the last step or a signal; returns a line that says how the run ended.

    Raises:
        InputError: for settings or inputs that do not fit, or if too many updates in a row were not finite.
    """
    mesh = start_devices(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(end_together())
        # One process of a job takes the lock for all; where it cannot, all end.
        first_process_decides(lambda: stack.enter_context(lock_folder(workdir)))
        for folder in (workdir, workdir / "samples"):
            remove_leftovers(folder)
        return train_on(run, workdir, mesh)


def train_on(run: RunSettings, workdir: Path, mesh: Mesh) -> str:
    """`train` on a mesh, in a folder that no other run uses."""
    goodput = Goodput()
    plan = make_sharding_plan(run.model, run.train, run.parallel, mesh)

    # ---- inputs on disk: what is missing is reported before any long work
    dataset = InstanceDataset(run.data.dir, run.data.train_split)
    check_validation(run)
    check_wandb(run.train.wandb)
    tokenizer = open_tokenizer(run)

    # ---- state: restored, or initialised in its shards
    facts = run_facts(run.train, run.model, dataset.fingerprint)
    checkpoints = Checkpoints(workdir, facts, run.train.keep_newest, run.train.keep_every)
    state, frozen = restore_or_start(run, plan, checkpoints)
    done, steps, window = int(state.step), run.train.steps, (run.train.profile_start, run.train.profile_steps)
    begin(run, workdir, done, mesh, goodput)

    # ---- input pipeline
    inputs = open_inputs(run, plan, dataset, tokenizer, frozen)
    validation = Validation(inputs) if validates(run) else None
    grid = SampleGrid(run, plan, workdir, tokenizer) if run.train.sample_every else None

    # ---- loop
    step = compile_step(make_train_step(run.model, run.train, plan), plan)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(contextlib.closing(StopSignal()))
        batches = stack.enter_context(contextlib.closing(inputs.batches(done)))
        writer = stack.enter_context(contextlib.closing(make_writer(run, workdir, done)))
        stack.callback(finish, checkpoints, goodput)
        profiler = stack.enter_context(contextlib.closing(ProfilerWindow(workdir, *window)))
        reporter, stopped = Reporter(run.train, writer, batches, goodput), False
        stack.enter_context(jax.transfer_guard("disallow"))
        while done < steps and reporter.sound and not stopped:
            goodput.switch("data_wait")
            batch = next(batches)
            goodput.switch("steps" if reporter.started else "compile")
            if not reporter.started:
                step = prepare_step(step, state, frozen, batch)
                reporter.start(done, make_clock(run, batch, mesh))
            profiler.before(done)
            state, metrics = step(state, frozen, batch)
            profiler.after(done, metrics)
            done += 1
            reporter.add(done, metrics)
            with jax.transfer_guard("allow"):
                if validation and due(done, run.train.validate_every):
                    with goodput.of("validation"):
                        writer.write(done, {"validation_loss": validation.loss(state, frozen)})
                if grid and due(done, run.train.sample_every):
                    with goodput.of("samples"):
                        writer.image(done, "samples", grid.draw(done, state, frozen))
                stopped = stop.reached(done)
                checkpoints.check()
                if due(done, run.train.save_every) or stopped or not reporter.sound or done == steps:
                    # Saving waits for the step anyway; what is saved has its numbers written.
                    reporter.flush()
                    with goodput.of("checkpoint"):
                        checkpoints.save(done, state)
    return outcome(run, workdir, done, reporter.sound, stopped)


def begin(run: RunSettings, workdir: Path, done: int, mesh: Mesh, goodput: Goodput) -> None:
    """Before the first step a job's first process leaves the settings, and finds what time was spent."""
    if jax.process_index() != 0:
        return
    goodput.resume(line_at(workdir / "metrics.jsonl", done))
    write_json(workdir / "config.json", signed(config_of(run)))
    print(f"{workdir}: from step {done} to {run.train.steps} on {mesh.size} devices", file=sys.stderr)


def prepare_step(step: Callable, state: TrainState, frozen: Params, batch: Mapping[str, Any]) -> Callable:
    """Compiles the step before it runs, so that the first process can say what memory it needs."""
    compiled, memory = compile_measured(step, state, frozen, batch)
    if jax.process_index() == 0:
        print(memory, file=sys.stderr)
    return compiled


def make_writer(run: RunSettings, workdir: Path, done: int) -> MetricsWriter:
    """What writes the metrics; on the job's first process only."""
    active = jax.process_index() == 0
    wandb = WandbRun(run.train.wandb, workdir, run.to_dict()) if active and run.train.wandb else None
    return MetricsWriter(workdir, done, run.train.steps, active, wandb)


def finish(checkpoints: Checkpoints, goodput: Goodput) -> None:
    """Waits until everything is saved, and says where the time went."""
    with goodput.of("checkpoint"):
        checkpoints.close()
    if jax.process_index() == 0:
        print(goodput, file=sys.stderr)


def start_devices(run: RunSettings) -> Mesh:
    """Joins the job's processes, configures jax for the run and makes the mesh."""
    initialize_distributed()
    enable_compilation_cache()
    if run.train.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh(run.parallel)
    check_batch(run.train.batch_size, run.train.accumulate, mesh)
    return mesh


def restore_or_start(run: RunSettings, plan: ShardingPlan, checkpoints: Checkpoints) -> tuple[TrainState, Params]:
    """The newest checkpoint's state, or a new one from the run's start; and the frozen parameters."""
    state = checkpoints.restore(plan.state_shapes())
    trainable, frozen = start_params(plan, run.model, run.train, only_frozen=state is not None)
    if state is None:
        state = jax.jit(init_state, out_shardings=plan.state_shardings())(trainable)
    return state, frozen


def config_of(run: RunSettings) -> dict[str, Any]:
    """What config.json holds. `train.start` is absolute: export and sampling may run in another folder."""
    groups = run.to_dict()
    if run.train.start:
        groups["train"]["start"] = str(absolute(run.train.start))
    return groups


def make_clock(run: RunSettings, batch: Mapping[str, Any], mesh: Mesh) -> Clock:
    """Measures the speed of steps like this batch's."""
    return Clock(run.train.batch_size, functools.partial(local_flops, run, batch, mesh), jax.devices()[0])


def local_flops(run: RunSettings, batch: Mapping[str, Any], mesh: Mesh) -> int:
    """Model FLOPs of one device's share of a step, without recomputation; counted from the jaxpr, nothing runs."""
    one = ParallelSettings(data=1, fsdp=1)
    settings = dataclasses.replace(run.train, remat="none", accumulate=1)
    plan = make_sharding_plan(run.model, settings, one, make_mesh(one, jax.local_devices()[:1]))
    rows = run.train.batch_size // mesh.size
    share = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    step = make_train_step(run.model, settings, plan)
    return count_flops(step, plan.state_shapes(), plan.frozen_shapes(), share)


def due(step: int, every: int) -> bool:
    """Whether what happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def outcome(run: RunSettings, workdir: Path, done: int, sound: bool, stopped: bool) -> str:
    """The run's last line; InputError if it was stopped because its updates were not finite."""
    if not sound:
        raise InputError(
            f"{workdir}: stopped after step {done}: loss or gradient not finite {run.train.max_skips} times in a row; "
            "the state is saved; look at the learning rate, the data and config.train.dtype"
        )
    if stopped:
        return f"{workdir}: stopped by a signal, saved after step {done}; the same command goes on"
    return f"{workdir}: trained to step {done}"
