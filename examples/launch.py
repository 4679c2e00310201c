"""How the examples start: flags they share, one function that runs on every rank, and the rank's GPU."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ep_rt

FRAMEWORKS = ("numpy", "cupy", "torch", "jax")


def example_parser(description: str | None, *, frameworks: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the flags that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="run N ranks as threads of this process (default: the ranks that mpiexec started, or one)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "host", "cuda"),
        default="auto",
        help="cuda: a GPU for each rank; threads may outnumber the GPUs and then share them, processes may "
        "not. auto (default): cuda where that is possible, else host",
    )
    parser.add_argument(
        "--framework",
        choices=frameworks,
        help="whose arrays to use (default: numpy; on GPUs torch if it is installed for them, else cupy)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_sizes(parser: argparse.ArgumentParser, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Add flags for integers of at least 1: default and meaning by name."""
    for name, (default, meaning) in sizes.items():
        help_text = f"{meaning} (default: {default})"
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=help_text)


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def launch(
    parser: argparse.ArgumentParser,
    run: Callable[[ep_rt.Group, argparse.Namespace], object],
    peers: object = None,
) -> None:
    """Call ``run(group, options)`` on every rank. What is wrong with the options is said once, by rank 0.

    Args:
        peers: the ranks that a launcher started; default: the processes of mpiexec, a single rank without it.
    """
    group = ep_rt.as_group(peers)
    unheard = io.StringIO()
    with contextlib.ExitStack() as stack:
        if group.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(unheard))
            stack.enter_context(contextlib.redirect_stderr(unheard))
        options = parser.parse_args()
        if options.ranks and group.size > 1:
            launcher = "mpiexec" if peers is None else "torchrun"
            parser.error(f"--ranks starts threads, but {launcher} started {group.size} processes already")
        if (options.backend, options.framework) in (("cuda", "numpy"), ("host", "cupy")):
            parser.error(f"--framework {options.framework} has no arrays for --backend {options.backend}")
        if options.framework and importlib.util.find_spec(options.framework) is None:
            parser.error(f"--framework {options.framework} is not installed")
        if not options.ranks and group.size == 1:
            print("one rank only; more with --ranks 4, or mpiexec -n 4 before python", file=sys.stderr)
    try:
        if options.ranks:
            ep_rt.run_local(run, options.ranks, options)
        else:
            run(group, options)
    except (ep_rt.ConfigError, ep_rt.ArrayError, ep_rt.BackendError) as error:
        sys.exit(f"error: {error}" if group.rank == 0 else 1)


def launch_torch(
    parser: argparse.ArgumentParser, run: Callable[[ep_rt.Group, argparse.Namespace], object]
) -> None:
    """`launch` for examples in PyTorch alone, which torchrun starts, too."""
    import torch

    def run_here(group: ep_rt.Group, options: argparse.Namespace) -> None:
        if options.ranks:
            # Torch loads kernels and takes memory at any time, for which the driver waits until the GPU is
            # idle; autograd has one thread for all ranks on it.
            if options.backend == "cuda":
                raise ep_rt.ConfigError(
                    "--backend cuda needs a process for each rank here: torchrun or mpiexec"
                )
            options.backend = "host"
        run(group, options)

    torch.set_num_threads(1)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")  # what travels between GPUs goes through the buffer
        launch(parser, run_here, torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()
    else:
        launch(parser, run_here)


@dataclass(frozen=True)
class Place:
    """Where a rank computes.

    Attributes:
        backend: to ask a buffer for; its answer says whether the GPU is used.
        framework: what ``--framework`` asks for, or None.
        gpu: the CUDA device that is current in this thread; None if there is none to use.
        gpu_framework: whose arrays are used there.
        is_shared: other ranks have the same GPU.
        has_threads_beside: other ranks are threads of this process.
    """

    group: ep_rt.Group
    backend: str
    framework: str | None
    gpu: int | None = None
    gpu_framework: str = "cupy"
    is_shared: bool = False
    has_threads_beside: bool = False


@contextlib.contextmanager
def place_of(group: ep_rt.Group, options: argparse.Namespace) -> Iterator[Place]:
    """Make this rank's GPU current if there is one for it, and a stream of its own. Collective.

    Buffers work on the device and the streams that are current, so they are made within. The default stream
    will not do for threads on one GPU: it is common to them, and they wait for each other.
    """
    # Both are read when the GPU is first used. Streams in one hardware queue run one after the other, so
    # ranks that wait for each other must not share one. JAX would take most of the memory for itself.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    host = Place(group, "host", options.framework)
    if options.backend == "host" or options.framework == "numpy":
        yield host
        return
    everyone = group.allgather((platform.node(), os.getpid(), visible_gpus()))
    if not all(gpus for _, _, gpus in everyone):
        yield replace(host, backend=options.backend)  # if that is cuda, the buffer says what is missing
        return
    framework = options.framework or default_gpu_framework()
    homes, obstacle = assign_gpus(everyone, framework)
    if obstacle is not None:
        if options.backend == "cuda":
            raise ep_rt.ConfigError(f"--backend cuda: {obstacle}")
        if group.rank == 0:
            print(f"host backend: {obstacle}", file=sys.stderr)
        yield host
        return
    home = homes[group.rank]
    node, pid, gpus = everyone[group.rank]
    gpu = gpus.index(home[1])
    with current_gpu(gpu, framework):
        yield Place(
            group,
            "cuda",
            options.framework,
            gpu,
            framework,
            is_shared=homes.count(home) > 1,
            has_threads_beside=[rank[:2] for rank in everyone].count((node, pid)) > 1,
        )


def assign_gpus(
    ranks: Sequence[tuple[str, int, list[str]]], framework: str
) -> tuple[list[tuple[str, str]], str | None]:
    """Give every rank the GPU that follows from its number among the ranks of its node.

    Args:
        ranks: node, process and visible GPUs of each. A launcher may show every process another GPU.

    Returns:
        Node and GPU of each, and why they cannot be used like that, or None.
    """
    nodes = [node for node, _, _ in ranks]
    homes = [(node, gpus[nodes[:rank].count(node) % len(gpus)]) for rank, (node, _, gpus) in enumerate(ranks)]
    num_gpus = len(set(homes))
    obstacle = None
    if len({(home, pid) for home, (_, pid, _) in zip(homes, ranks, strict=True)}) > num_gpus:
        obstacle = "there are more processes than GPUs, and only threads can share one: see --ranks"
    elif framework == "jax" and len(homes) > num_gpus:
        obstacle = "with JAX, whose streams are common to all threads, every rank needs a GPU of its own"
    elif not knows_cuda(framework):
        obstacle = f"{framework} as installed here knows no GPU"
    return homes, obstacle


@contextlib.contextmanager
def current_gpu(gpu: int, framework: str) -> Iterator[None]:
    """Make a GPU and a new non-blocking stream of it current in this thread, for CuPy and `framework`."""
    import cupy

    with contextlib.ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(gpu))
        if framework == "torch":
            import torch

            stack.enter_context(torch.cuda.device(gpu))
            stream = torch.cuda.Stream()  # torch's streams are non-blocking, and live as long as torch
            stack.enter_context(torch.cuda.stream(stream))
            if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
                stack.enter_context(cupy.cuda.Stream.from_external(stream))
            else:
                stack.enter_context(cupy.cuda.ExternalStream(stream.cuda_stream, gpu))
        else:
            stack.enter_context(cupy.cuda.Stream(non_blocking=True))
        yield


def visible_gpus() -> list[str]:
    """The PCI addresses of the GPUs that this process can use; ep_rt needs CuPy for them."""
    try:
        from cupy.cuda import runtime

        return [str(runtime.deviceGetPCIBusId(gpu)) for gpu in range(runtime.getDeviceCount())]
    except Exception:  # not installed, no driver, no device
        return []


def knows_cuda(framework: str) -> bool:
    if framework == "torch":
        import torch

        return bool(torch.cuda.is_available())
    if framework == "jax":
        import jax

        return bool(jax.default_backend() == "gpu")
    return True


def default_gpu_framework() -> str:
    return "torch" if importlib.util.find_spec("torch") and knows_cuda("torch") else "cupy"
