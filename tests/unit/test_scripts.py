"""How pods are started: the scripts parse, and every command in them has the flags that it is given."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from common import ROOT
from instdiff_jax.cli import sample, train
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.errors import InputError
from instdiff_jax.parallel import chip_flags
from instdiff_jax.training.settings import RunSettings

SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*") if path.is_file())
SHELL = [path for path in SCRIPTS if path.suffix in (".sh", ".sbatch")]
YAML = [path for path in SCRIPTS if path.suffix == ".yaml"]


def test_there_is_a_script_for_each_way():
    assert {path.relative_to(ROOT / "scripts").as_posix() for path in SCRIPTS} == {
        "gpu/sample.sbatch",
        "gpu/train.sbatch",
        "tpu/jobset.yaml",
        "tpu/sample_job.yaml",
        "tpu/tpu_vm.sh",
    }


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_shell_reads_it(path):
    subprocess.run(["bash", "-n", path], check=True)
    if linter := shutil.which("shellcheck"):
        subprocess.run([linter, "--shell=bash", path], check=True)


def commands(path: Path) -> list[list[str]]:
    """The words of every command of ours in a script."""
    text = path.read_text()
    if path.suffix == ".yaml":
        (container,) = pods(path)["containers"]
        bash, option, text = container["command"]
        assert (bash, option) == ("bash", "-c")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = re.findall(r"python3? ((?:train|sample)\.py .*)", "\n".join(lines))
    return [shlex.split(line.replace("$", "")) for line in found]


def pods(path: Path) -> dict:
    """What a manifest says about its pods."""
    manifest = yaml.safe_load(path.read_text())
    job = manifest["spec"]
    if manifest["kind"] == "JobSet":
        (slices,) = job["replicatedJobs"]
        job = slices["template"]["spec"]
        assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 4
    return job["template"]["spec"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_its_commands_have_their_flags(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ((name, *argv),) = commands(path)
    if name == "train.py":
        run, rest = read_settings(argv, RunSettings)
        assert train.parse_args(rest).workdir and run.train.remat == "blocks"
    else:
        args = sample.parse_args(argv)
        assert args.resume and args.shard and args.layout
    assert (ROOT / name).is_file()


def test_a_manifest_asks_for_the_chips_of_a_host_and_time_to_save():
    pod = pods(ROOT / "scripts" / "tpu" / "jobset.yaml")
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["restartPolicy"] == "Never"
    job = yaml.safe_load((ROOT / "scripts" / "tpu" / "sample_job.yaml").read_text())["spec"]
    assert job["completionMode"] == "Indexed"
    assert (
        f'--shard "$JOB_COMPLETION_INDEX/{job["completions"]}"'
        in job["template"]["spec"]["containers"][0]["command"][2]
    )


def test_the_batch_divides_by_the_devices_of_each_script():
    devices = {"tpu_vm.sh": 16, "jobset.yaml": 2 * 16, "train.sbatch": 4 * 8}
    for path in SCRIPTS:
        if path.name in devices:
            ((_, *argv),) = commands(path)
            run, _ = read_settings(argv, RunSettings)
            assert run.train.batch_size % (devices[path.name] * run.train.accumulate) == 0
            assert run.train.batch_size // devices[path.name] // run.train.accumulate == 8


# ---------------------------------------------------------------- flags


def test_flags_are_exported_before_those_of_the_user_and_a_cpu_has_none():
    assert chip_flags.export_line("cpu") == ""
    for chip in ("v5e", "v5p", "v6e", "gpu"):
        name, flags = chip_flags.CHIP_FLAGS[chip]
        line = chip_flags.export_line(chip)
        script = f"{line}; printf '%s' \"${name}\""
        said = subprocess.run(["bash", "-euc", script], env={name: "--mine=1"}, capture_output=True, text=True)
        assert said.stdout.split() == [*flags, "--mine=1"]
    with pytest.raises(InputError, match="chip: expected one of cpu, gpu, v5e, v5p, v6e, got 'v9'"):
        chip_flags.export_line("v9")


def test_every_chip_named_in_a_script_has_flags():
    named = re.findall(r"chip_flags (\w+)|CHIP:-(\w+)", "\n".join(path.read_text() for path in SCRIPTS))
    assert {first or second for first, second in named} == {"v5e", "gpu"}


@pytest.mark.parametrize(("chip", "shape"), [("v5e", "2x2"), ("v5p", "2x2x1"), ("v6e", "2x2")])
def test_the_tpu_compiler_takes_its_flags(chip, shape):
    """It ends the process at a flag that it does not know."""
    pytest.importorskip("libtpu", reason="the TPU's compiler is an extra: pip install libtpu")
    script = (
        "import jax; from instdiff_jax.aot.programs import topology_devices; d = topology_devices('{}')[0]; "
        "s = jax.sharding.SingleDeviceSharding(d); x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=s); "
        "jax.jit(lambda x: x + 1).lower(x).compile(); print('compiled')".format(f"{chip}:{shape}")
    )
    name, flags = chip_flags.CHIP_FLAGS[chip]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for more, ends_well in (("", True), (" --xla_tpu_no_such_flag=true", False)):
        said = subprocess.run(
            [sys.executable, "-c", script], env=env | {name: " ".join(flags) + more}, cwd=ROOT, capture_output=True
        )
        assert (b"compiled" in said.stdout) == ends_well, said.stderr[-2000:]


# ---------------------------------------------------------------- Dockerfile

INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "CMD"}


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """The stages of the Dockerfile: what each starts from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        assert instruction in INSTRUCTIONS, line
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\w+)", rest).groups()
            assert base in found or re.fullmatch(r"[\w./-]+:[\w.-]+", base), "an image has a tag"
            found[name] = base, []
        else:
            list(found.values())[-1][1].append((instruction, rest))
    return found


def test_dockerfile_has_a_target_per_kind_of_chip():
    found = stages()
    assert set(found) == {"base", "cpu", "tpu", "gpu", "studio"}
    extras = {"cpu": set(), "tpu": {"jax[tpu]"}, "gpu": {"jax[cuda12]"}}
    readme = (ROOT / "requirements.txt").read_text()
    for target, extra in extras.items():
        base, lines = found[target]
        assert base == "base"
        (install,) = [shlex.split(rest) for instruction, rest in lines if instruction == "RUN"]
        assert install[:4] == ["pip", "install", "--no-cache-dir", "-r"] and (ROOT / install[4]).is_file()
        assert {word for word in install[5:] if word.startswith("jax")} == extra
        assert all(f'"{word}"' in readme for word in extra)
        (command,) = [json.loads(rest) for instruction, rest in lines if instruction == "CMD"]
        assert (ROOT / command[1]).is_file()
    studio = dict(found["studio"][1])
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["studio"]
    assert shlex.split(studio["RUN"])[5:] == [re.split("[>=]", package)[0] for package in extra]
    assert json.loads(studio["CMD"])[:4] == ["python", "-m", "instdiff_jax", "studio"]
    for _, lines in found.values():
        for instruction, rest in lines:
            if instruction == "COPY":
                *sources, _ = rest.split()
                assert all((ROOT / source).exists() for source in sources)


@pytest.mark.slow
def test_docker_builds_the_target_for_cpus():
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed: the Dockerfile is only read")
    subprocess.run(["docker", "build", "--target", "cpu", "--tag", "instdiff:test", "."], cwd=ROOT, check=True)
    subprocess.run(["docker", "run", "--rm", "instdiff:test", "python", "sample.py", "--steps", "1"], check=True)
